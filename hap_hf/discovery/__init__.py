"""What can be removed from a model: units, found by what depends on what, and proven by trying.

No list of model names and no table of ops: the model is run once with every linear layer cut open, autograd says which
features belong together, and every group so found is tried against masking before it is returned.
"""

from hap_hf.discovery.find import Discovery, discover, find_groups
from hap_hf.discovery.verify import check_equals_masked
from hap_hf.discovery.whole import LeftWhole

__all__ = ["Discovery", "LeftWhole", "check_equals_masked", "discover", "find_groups"]
