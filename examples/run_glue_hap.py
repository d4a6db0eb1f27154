r"""Fine-tune a text classifier on GLUE or on data of your own, prune it, fine-tune it again and reload it.

The flags are those of transformers' ``run_glue.py`` and of its ``TrainingArguments``; beside them, every setting of
``hap_hf.HapConfig`` is a flag of the same name. ``--help`` describes them all. A run goes through these stages:

1. ``--do_train`` fine-tunes the dense model for ``--num_train_epochs`` and saves it (to ``OUTPUT_DIR/dense`` if it is
   pruned afterwards). ``--num_train_epochs 0`` leaves this out, for a model that is fine-tuned already.
2. With an amount (``--prune_ratio``, ``--target_params`` or ``--target_macs``) a second training follows, of
   ``--recovery_epochs`` epochs, in which ``HessianPruner`` prunes the model: before the first step, or after
   ``--prune_step`` steps or ``--prune_epoch`` epochs, in ``--num_rounds`` rounds. Without an amount this is plain
   fine-tuning.
3. ``--do_eval`` evaluates the dense model, the pruned model before and after recovery, and, as ``eval_*``, the model
   that ``AutoModelForSequenceClassification.from_pretrained`` reads back from ``OUTPUT_DIR``.
4. ``--do_predict`` writes predictions for the test data.

``OUTPUT_DIR/all_results.json`` holds every metric, size and time. Everything works on local files without a network:

    python examples/run_glue_hap.py --model_name_or_path ./my-bert --task_name mrpc \
        --train_file mrpc_train.parquet --validation_file mrpc_validation.parquet \
        --do_train --do_eval --num_train_epochs 3 --per_device_train_batch_size 16 --learning_rate 5e-5 \
        --target_params 0.5 --implant_ratio 0.2 --max_batches 8 --recovery_epochs 2 --output_dir runs/mrpc
"""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import transformers
from glue.data import label_names, load_splits, text_columns, tokenize
from glue.metrics import make_metric
from glue.settings import DataArguments, ModelArguments, parse
from glue.stages import Material, fine_tune, predict, prune_and_recover
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

logger = logging.getLogger("run_glue_hap")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the stages that the command line asks for.

    Args:
        argv: The arguments, by default the program's.

    Returns:
        What ``all_results.json`` holds.

    Raises:
        ValueError: If the flags, the data or the model do not fit together.
    """
    start = time.perf_counter()
    model_args, data_args, pruning, args = parse(argv)
    _set_up_logging(args)
    set_seed(args.seed)
    args.dataloader_pin_memory &= args.device.type != "cpu"  # there it does nothing but warn
    config = pruning.to_config(args.seed)
    trains = args.do_train and (args.num_train_epochs > 0 or args.max_steps > 0)
    model, material, untrained = prepare(model_args, data_args, args)
    if untrained and not trains:
        raise ValueError(
            f"{model_args.model_name_or_path} is not fine-tuned, it has no values for {', '.join(sorted(untrained))}; "
            "pass --do_train and --num_train_epochs above 0"
        )

    results: dict[str, float] = {}
    if trains:
        pruned_next = config is not None
        folder = Path(args.output_dir, "dense") if pruned_next else Path(args.output_dir)
        push = args.push_to_hub and not pruned_next
        results |= fine_tune(model, dataclasses.replace(args, output_dir=str(folder), push_to_hub=push), material)
    if config is not None:
        results |= prune_and_recover(model, args, material, config, pruning)
    if args.do_train:
        model = AutoModelForSequenceClassification.from_pretrained(args.output_dir)
    if args.do_eval:
        results |= material.evaluate(material.trainer(model, args), "eval")
    if args.do_predict:
        predict(model, args, material, data_args.task_name)
    results["total_seconds"] = time.perf_counter() - start
    file = Path(args.output_dir, "all_results.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shown = ("accuracy", "f1", "correlation", "pearson", "spearmanr", "mse", "params", "macs", "seconds")
    summary = [f"{name} {value:.6g}" for name, value in results.items() if any(word in name for word in shown)]
    logger.info("results in %s: %s", file, ", ".join(summary))
    return results


def _set_up_logging(args: TrainingArguments) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    level = args.get_process_log_level()
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)
    for name in ("run_glue_hap", "glue", "hap_hf"):
        logging.getLogger(name).setLevel(logging.INFO if args.log_level == "passive" else level)


def prepare(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> tuple[PreTrainedModel, Material, set[str]]:
    """Load data and model.

    Args:
        model_args: Which model.
        data_args: Which data.
        args: The Trainer's arguments, which say what splits are used.

    Returns:
        The model, what it works on, and the names of its weights that are new.

    Raises:
        ValueError: If the data and the model do not fit together.
    """
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    splits = load_splits(
        data_args, [s for s, used in wanted.items() if used], cache_dir=model_args.cache_dir, token=model_args.token
    )
    columns = text_columns(splits, data_args.task_name)

    name = model_args.model_name_or_path
    source = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    model_config = AutoConfig.from_pretrained(model_args.config_name or name, **source)
    names = label_names(splits, data_args.task_name, model_config)
    model_config.num_labels = len(names) or 1
    model_config.problem_type = "single_label_classification" if names else "regression"
    if names:
        model_config.id2label = dict(enumerate(names))
        model_config.label2id = {label: number for number, label in enumerate(names)}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **source)
    if tokenizer.pad_token is None:  # as in most decoders
        tokenizer.pad_token = tokenizer.eos_token
        model_config.pad_token_id = tokenizer.pad_token_id
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name,
        config=model_config,
        dtype="float32",  # whatever it is stored in: optimizer steps get lost in half precision
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        output_loading_info=True,
        **source,
    )
    untrained = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}

    material = Material(
        tokenize(splits, tokenizer, columns=columns, names=names, data=data_args),
        tokenizer,
        make_metric(data_args.task_name, regression=not names, path=data_args.metric_path),
        names,
        data_args.pad_to_max_length,
    )
    return model, material, untrained


if __name__ == "__main__":
    main()
