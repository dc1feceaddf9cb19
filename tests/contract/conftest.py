"""What is promised holds with the frozen part folded, and as it is."""

from tests.support.folding import folded_and_not

folding = folded_and_not(slow="plain")
