"""What the examples print: their scores, with a margin, and their checks of their own claims."""

import json
import re

import pytest

from tests.support.examples import ROOT, run, run_by_itself, run_notebook


def numbers(pattern, printed):
    """Return the numbers that a pattern finds in what an example printed."""
    found = re.search(pattern, printed)
    assert found, printed
    return [float(number) for number in found.groups()]


@pytest.mark.slow
def test_gan():
    printed = run("gan")
    share, untrained, real = numbers(r"surely a digit: ([\d.]+) .*untrained ([\d.]+), real ([\d.]+)", printed)
    assert untrained < 0.1 < 0.35 < share < real
    (digits,) = numbers(r"kinds of digits: (\d+) of 10", printed)
    assert digits >= 8
    assert "left the discriminator bit-identical: True" in printed


@pytest.mark.slow
def test_wgan_gp():
    printed = run("wgan_gp")
    share, untrained, modes = numbers(r"near a mode: ([\d.]+) .*untrained ([\d.]+)\), (\d) of 8", printed)
    assert untrained < 0.2 < 0.7 < share
    assert modes == 8
    assert "within 0.2 of 1: True" in printed


@pytest.mark.slow
def test_distillation():
    printed = run("distillation")
    scores = r"teacher ([\d.]+), alone ([\d.]+), distilled ([\d.]+), averaged ([\d.]+)"
    teacher, alone, distilled, averaged = numbers(scores, printed)
    assert averaged > 0.93
    assert teacher > 0.95
    assert distilled > 0.93
    assert distilled > alone + 0.03
    assert "the teacher is bit-identical: True" in printed


@pytest.mark.slow
def test_lora():
    printed = run("lora")
    pretrained, head, lora = numbers(r"on 0-4 ([\d.]+), head only ([\d.]+), LoRA ([\d.]+)", printed)
    assert pretrained > 0.93
    assert lora > 0.88
    assert lora > head + 0.08
    assert numbers(r"LoRA trains ([\d.]+)%", printed) == [5.6]
    assert "the base is bit-identical: True" in printed


@pytest.mark.slow
def test_maml():
    printed = run("maml")
    before, after = numbers(r"meta-trained: .* ([\d.]+), after one step ([\d.]+)", printed)
    (without,) = numbers(r"without the inner step: .* after one step ([\d.]+)", printed)
    assert after < 0.3 * before
    assert after < 0.4 * without
    assert "agrees with differences of the loss: True" in printed


@pytest.mark.slow
def test_two_speeds():
    printed = run("two_speeds")
    learned, kept = numbers(r"two speeds ([\d.]+) and ([\d.]+)", printed)
    fast_learned, fast_kept = numbers(r"one, fast ([\d.]+) and ([\d.]+)", printed)
    slow_learned, slow_kept = numbers(r"one, slow ([\d.]+) and ([\d.]+)", printed)
    assert learned > max(0.85, slow_learned + 0.05)
    assert kept > max(0.95, fast_kept + 0.15)
    assert fast_learned > 0.93
    assert slow_kept > 0.95
    rates = re.findall(r"step +(\d+): head (\S+), backbone (\S+)", printed)
    assert rates[:2] == [("0", "0.0e+00", "0.0e+00"), ("20", "9.3e-03", "8.3e-05")]
    assert "every rate was as scheduled: True" in printed


@pytest.mark.slow
def test_transfer_digits():
    printed = run_by_itself("transfer_digits")
    scores = r"pretrained on 0-4 ([\d.]+), head only ([\d.]+), head and last block ([\d.]+)"
    pretrained, head, block = numbers(scores, printed)
    assert pretrained > 0.9
    assert head > 0.7
    assert block > 0.9
    assert printed.count("are as they were") == 2


@pytest.mark.slow
def test_feature_extraction():
    printed = run("feature_extraction")
    assert "the backbone, batch statistics included, is bit-identical" in printed
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_partial_freeze():
    before, after = numbers(r"new target ([\d.]+) -> ([\d.]+); blocks 0 and 1", run("partial_freeze"))
    assert after < 0.1 * before


@pytest.mark.slow
def test_resume():
    printed = run_by_itself("resume")
    assert [int(code) for code in re.findall(r"exit code (-?\d+)", printed)] == [-9, 143, 0]
    assert printed.count("Resuming from") == 2
    assert "the weights are bit-identical: True" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["explicit_tape", "adaptive_policy"])
def test_accuracy(name):
    printed = run(name)
    assert float(re.findall(r"accuracy ([\d.]+)", printed)[-1]) > 0.85
    assert name == "explicit_tape" or re.search(r"\n3 phases, 3 traces", printed)


@pytest.mark.slow
def test_quickstart():
    printed = run_notebook("quickstart")
    assert re.search(r"^True$", printed, re.MULTILINE)  # the backbone is bit-identical
    pretrained, at_last = map(float, re.findall(r"^\{.*'accuracy': ([\d.]+)\}$", printed, re.MULTILINE))
    head, both = map(float, re.findall(r"epoch 8/8: .*\n  validation: .*accuracy ([\d.]+)", printed))
    assert pretrained > 0.95
    assert 0.5 < head < 0.9 < both
    assert both == pytest.approx(at_last, abs=1e-3)
    assert "\nFigure(" in printed


def test_the_notebook_holds_no_outputs():
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
