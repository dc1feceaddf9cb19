"""What `import tapeloop` imports: nothing until a public name is used, and then little beside what Keras imports."""

import json
import subprocess
import sys

# Modules of the standard library are left out: some are imported already, by whatever starts Python.
COUNTED = """
import json, sys
def others():
    return {name for name in sys.modules if name.split(".")[0] not in sys.stdlib_module_names}
found = [others()]
import tapeloop
found.append(others())
import keras
found.append(others())
tapeloop.Trainer
found.append(others())
print(json.dumps([sorted(after - before) for before, after in zip(found, found[1:])]))
"""


def test_importing_it_imports_nothing_else_and_using_it_little_beside_keras():
    result = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    at_once, _, when_used = json.loads(result.stdout)
    assert at_once == ["tapeloop", "tapeloop._version"]
    others = {name for name in when_used if not name.startswith("tapeloop.")}
    assert {name.split(".")[0] for name in others} <= {"tqdm"}
    assert "tqdm.notebook" not in others  # which needs IPython and widgets
