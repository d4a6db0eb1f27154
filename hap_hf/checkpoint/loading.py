"""Rebuilding a pruned model inside ``from_pretrained``, while it has no storage yet.

transformers has one place in which a checkpoint may say that its modules differ from what its config describes, and one
mechanism that reads it in time: ``quantization_config`` and the quantizer registered for its ``quant_method``.
Importing this module registers ``"hap_hf"``. A loaded model is then stripped of every sign of quantization: it is an
ordinary model with fewer weights, and only its config still carries the plan.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from hap_hf.checkpoint.entry import QUANT_METHODS, HapPlanConfig
from hap_hf.checkpoint.files import check_files, check_sizes
from hap_hf.checkpoint.host import forget_quantized_, was_loaded
from hap_hf.checkpoint.parts import share_with_parts_
from hap_hf.errors import ConfigError, PlanMismatchError
from hap_hf.model.quantizing import apply_bits_, expect_stored_, unpack_
from hap_hf.names.bits import BitPlan
from hap_hf.names.plan import PruningPlan
from hap_hf.report.files import open_tensors
from hap_hf.surgery import apply_plan_

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes, as torch allocates on the CPU


class HapQuantizer(HfQuantizer):
    """The hooks through which ``from_pretrained`` rebuilds a pruned model; quantizes nothing.

    transformers builds the dense model without storage, calls ``_process_model_before_weight_loading``, where it is
    pruned, reads the weights into it, and calls ``_process_model_after_weight_loading``.

    Args:
        quantization_config: The entry of ``config.json``.
        **kwargs: ``pre_quantized``, from transformers.
    """

    def __init__(self, quantization_config: HapPlanConfig, **kwargs: Any) -> None:
        """Take over the plan of the entry.

        Raises:
            ConfigError: If the entry came as an argument and not from the checkpoint's config.
        """
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ConfigError(
                "expected the checkpoint of a pruned model, got a dense one and a plan as quantization_config; "
                "load the model without it and call hap_hf.apply_plan_(model, plan)"
            )
        # Without this method transformers leaves renamed tensors of pre-quantized checkpoints in their stored dtype.
        self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")
        self.plan, self.bits = quantization_config.plan, quantization_config.bits
        self._packed: Mapping[str, Any] = {}
        self._shapes: dict[str, list[int]] = {}
        self._cut: set[str] = set()

    def is_serializable(self) -> bool:
        """Return True: a pruned model is saved like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: a pruned model is trained like any other."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check the arguments of ``from_pretrained`` that transformers passes on.

        Args:
            *args: None so far.
            **kwargs: ``weights_only`` among others.

        Raises:
            ConfigError: If pickles that run code are allowed.
        """
        if kwargs.get("weights_only") is False:
            raise ConfigError("expected weights_only=True for a pruned model, got False; it is read from safetensors")

    def update_attn_implementation(self, config: Any) -> Any:
        """Name a dtype where the config has none: transformers would look for one in weights that may be a pickle.

        Args:
            config: The model's config.

        Returns:
            The same config, with a dtype.
        """
        if getattr(config, "dtype", None) is None:
            config.dtype = torch.get_default_dtype()
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Prune the model, which has no storage yet, and compare it with the files before a weight is read."""
        files = [str(file) for file in kwargs.get("checkpoint_files") or ()]
        check_files(files)
        self.plan, self.bits = _fit_to_class(self.plan, self.bits, model)
        check_sizes(self.plan, files)
        with torch.device("cpu"):  # transformers makes meta the default here, and indices must have values
            apply_plan_(model, self.plan)
        if self.bits is not None:
            apply_bits_(model, self.bits)
            self._packed = expect_stored_(model, self.bits.stored)
        # Of the pruned model: what the checkpoint must hold.
        self._shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        # Whole layers, as an implant's weights and the rest of a cut layer must come from the checkpoint, too.
        self._cut = {_owner(s.tensor) for g in self.plan for s in g.group.slices}
        self._cut |= set(self.bits.layers) if self.bits is not None else set()
        self._refuse(self._not_stored())
        self._refuse(self._stored_otherwise(files, f"{model.base_model_prefix}."))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Check what was read, and leave an ordinary model whose config alone tells of the plan."""
        self._refuse(self._not_loaded(model))
        if self.bits is not None:
            unpack_(model, self._packed)
        _align(model)
        # Taken for quantized it could not be cast, and neither transformers nor hap_hf would let it be changed again.
        forget_quantized_(model)
        # A plain dict, as AutoConfig reads it: from_pretrained(..., config=model.config) takes nothing else.
        model.config.quantization_config = HapPlanConfig(self.plan, self.bits).to_dict()
        share_with_parts_(model, self.plan)
        return model

    def _refuse(self, wrong: Iterable[str]) -> None:
        """Raise if there is any sentence: transformers would fill the gaps at random and only log it."""
        listed = list(islice(wrong, 20))
        if listed:
            raise PlanMismatchError(
                "the checkpoint's weights are not those that the plan in its config.json describes, and pruned weights "
                "are never initialised anew, not with ignore_mismatched_sizes either; take both from one save:\n  "
                + "\n  ".join(listed)
            )

    def _not_stored(self) -> Iterator[str]:
        """Yield a sentence for each cut tensor that no checkpoint holds, so that nothing could fill what is left."""
        for name in sorted({s.tensor for g in self.plan for s in g.group.slices} - self._shapes.keys()):
            yield f"{name}: expected a weight that checkpoints hold, got a buffer that they do not"

    def _stored_otherwise(self, files: Iterable[str], prefix: str) -> Iterator[str]:
        """Yield a sentence for each tensor of a cut layer that a file holds in another shape, by the model's names."""
        for file in files:
            with open_tensors(file) as stored:
                for key in list(stored.keys()):
                    for name in {key, key.removeprefix(prefix), prefix + key} & self._shapes.keys():
                        shape = list(stored.get_slice(key).get_shape())
                        if _owner(name) in self._cut and shape != self._shapes[name]:
                            yield f"{name}: expected shape {self._shapes[name]}, got {shape}"

    def _not_loaded(self, model: PreTrainedModel) -> Iterator[str]:
        """Yield a sentence for each tensor that did not come from the checkpoint in the shape it should have."""
        base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
        for name, tensor in model.state_dict(keep_vars=True).items():
            # What the plan leaves alone may be new, as a head is, but not in numbered layers: plans may leave some out.
            layers = isinstance(tensor, nn.Parameter) and name.startswith(base)
            numbered = layers and any(part.isdigit() for part in name.split("."))
            fixed = numbered or _owner(name) in self._cut
            # transformers marks what it loaded. Offloaded tensors are read, and their shapes checked, at each use.
            loaded = tensor.is_meta or was_loaded(tensor)
            if list(tensor.shape) != self._shapes[name]:
                hint = "" if fixed else "; a head of another size needs transformers 5.23 or newer"
                yield f"{name}: expected shape {self._shapes[name]}, got {list(tensor.shape)}{hint}"
            elif fixed and not loaded:
                yield f"{name}: expected shape {self._shapes[name]}, got none of that name and shape"


for _method in QUANT_METHODS:
    register_quantization_config(_method)(HapPlanConfig)
    register_quantizer(_method)(HapQuantizer)


def _fit_to_class(
    plan: PruningPlan, bits: BitPlan | None, model: PreTrainedModel
) -> tuple[PruningPlan, BitPlan | None]:
    """Return ``plan`` and ``bits`` with the names that their modules have in a model of this class.

    A base model lacks the prefix that its modules have inside a task model. Groups of which the class has nothing, such
    as the decoder's in a model that is only the encoder, are left out; the weights then tell whether that was right.

    Args:
        plan: The plan, as it was recorded.
        bits: The bits, as they were recorded.
        model: The model to be pruned.

    Returns:
        Both with other names.

    Raises:
        PlanMismatchError: If the model has none of the modules.
    """
    prefix = f"{model.base_model_prefix}."
    modules = {name for name, _ in model.named_modules()}
    owners = {_owner(s.tensor) for g in plan for s in g.group.slices} | set(bits.layers if bits is not None else ())

    def unchanged(name: str) -> str:
        return name

    def shortened(name: str) -> str:
        return name.removeprefix(prefix)

    def lengthened(name: str) -> str:
        return prefix + name

    # The one under which most modules are found; where several do equally well, the first.
    rename = max((unchanged, shortened, lengthened), key=lambda f: sum(f(name) in modules for name in owners))
    renamed = plan.renamed(rename)
    if rename is shortened:
        # A base model has no head: what that reads of the last channels has no place in it.
        heads = {name for name in owners if not name.startswith(prefix) and name not in modules}
        renamed = replace(renamed, stages=tuple(tuple(g.without(heads) for g in stage) for stage in renamed.stages))
    bypasses = tuple(tuple(b for b in stage if {b.entry, b.exit} <= modules) for stage in renamed.bypasses)
    # Later stages and bits name layers that the plan itself makes.
    modules |= {_owner(name) for stage in bypasses for b in stage for name in b.shapes}
    stages = tuple(
        tuple(g for g in stage if not modules.isdisjoint(_owner(s.tensor) for s in g.group.slices))
        for stage in renamed.stages
    )
    if bits is not None:
        bits = bits.renamed(rename)
        bits = replace(bits, layers={name: b for name, b in bits.layers.items() if name in modules})
    if owners and not any(stages) and not (bits is not None and bits.layers):
        raise PlanMismatchError(
            f"the plan in config.json names modules such as {min(owners)!r}, and this {type(model).__name__} has none "
            "of them; it was made for another model"
        )
    left_out = sum(map(len, plan.stages)) - sum(map(len, stages))
    if left_out:
        logger.info("%d pruned groups of the checkpoint have no place in %s", left_out, type(model).__name__)
    return replace(plan, stages=stages, bypasses=bypasses), bits


def _align(model: nn.Module) -> None:
    """Give weights that lie at odd addresses of a mapped file memory of their own.

    Cut tensors have odd sizes and throw all that follow them in the file out of line. Matrix products then take slower
    paths that also round differently: logits would differ from the saved model's in the last bits.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        if type(tensor) in {torch.Tensor, nn.Parameter} and tensor.is_cpu and tensor.data_ptr() % ALIGNMENT:
            # The parameter itself remains, as tied weights are one object.
            tensor.data = tensor.data.clone()


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
