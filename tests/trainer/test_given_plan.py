"""A plan that was made elsewhere is carried out in a training, at its time, without scoring."""

import copy
from dataclasses import replace

import pytest
import transformers as hf
from trainings import assert_same, config, make_trainer, samples, tiny_bert, tiny_model

from hap_hf import ConfigError, HapConfig, HessianPruner, PlanMismatchError, decide, plan_of, prune
from hap_hf.names.plan import PruningPlan

QUICK = {"method": "magnitude"}


def batches():
    return [hf.default_data_collator(samples()[:8])]


def decision_for(model, **settings):
    wanted = config(**{**QUICK, **settings})
    return decide(wanted.evidence(model, batches()), wanted)


@pytest.fixture(scope="module")
def two_stages():
    """Return the plan of a model that was pruned twice."""
    model = tiny_model()
    for ratio in (0.3, 0.4):
        prune(model, batches(), config(**QUICK, prune_ratio=ratio))
    return plan_of(model)


def trained(tmp_path, *, model=None, **given):
    trainer = make_trainer(tmp_path, model or tiny_model(), HessianPruner(**given), max_steps=4)
    trainer.train()
    return trainer


def test_it_does_what_scoring_at_that_time_does_and_scores_nothing(tmp_path, monkeypatch):
    settings = config(**QUICK, implant_ratio=0.3)
    scored = trained(tmp_path, config=settings, step=2)
    monkeypatch.setattr("hap_hf.trainer.round.prune_round", None)
    given = trained(tmp_path, config=settings, plan=plan_of(scored.model), step=2)
    assert_same(given.model, scored.model)
    assert plan_of(given.model) == plan_of(scored.model)
    early = trained(tmp_path, config=settings, plan=plan_of(scored.model), step=1)  # the control
    with pytest.raises(AssertionError):
        assert_same(early.model, scored.model)


@pytest.mark.parametrize("form", ["plan", "decision", "json", "checkpoint"])
def test_each_form_of_a_plan_is_taken(form, tmp_path):
    model = tiny_model()
    decision = decision_for(model)
    pruned = tiny_model()
    prune(pruned, batches(), config(**QUICK))
    pruned.save_pretrained(tmp_path / "pruned")
    forms = {
        "plan": plan_of(pruned),
        "decision": decision,
        "json": plan_of(pruned).to_dict(),
        "checkpoint": tmp_path / "pruned",
    }
    pruner = HessianPruner(plan=forms[form], step=1)
    trainer = make_trainer(tmp_path, model, pruner, max_steps=2)
    trainer.train()
    (report,) = pruner.reports
    assert plan_of(trainer.model).stages == decision.plan.stages
    assert report.after.params == trainer.model.num_parameters() < report.before.params
    assert report.loss_before is not None is not report.loss_after
    assert report.asked == (decision.expected.asked if form == "decision" else "what a given plan says")
    assert (report.scores is not None) == (form == "decision")
    # Settings are those of the decision, and the defaults of a plan.
    assert (pruner.config == decision.config) == (form == "decision")


def test_each_stage_is_a_round(two_stages, tmp_path):
    pruner = HessianPruner(config(**QUICK), plan=two_stages, step=1, interval=2)
    trainer = make_trainer(tmp_path, tiny_model(), pruner, max_steps=4)
    trainer.train()
    assert plan_of(trainer.model).stages == two_stages.stages
    assert pruner.num_rounds == len(pruner.reports) == 2
    at = [entry["step"] for entry in trainer.state.log_history if "prune_params" in entry]
    assert at == [1, 3]


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_training_goes_on_with_the_next_stage(step, two_stages, tmp_path):
    def new():
        pruner = HessianPruner(config(**QUICK), plan=two_stages, step=1, interval=2)
        saving = {"save_strategy": "steps", "save_steps": 1}
        return make_trainer(tmp_path, tiny_model(), pruner, max_steps=4, **saving)

    whole = new()
    whole.train()
    again = new()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_same(again.model, whole.model)
    other = PruningPlan((two_stages.stages[0][:1], two_stages.stages[1]))
    pruner = HessianPruner(config(**QUICK), plan=other, step=1, interval=2)
    another = make_trainer(tmp_path, tiny_model(), pruner, max_steps=4)
    with pytest.raises(ConfigError, match="rounds so far did something else than the plan says; resume with the plan"):
        another.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (lambda: (tiny_bert(intermediate_size=32), None), PlanMismatchError, r"does not fit .* expected shape .*24"),
        (lambda: (tiny_bert(num_hidden_layers=1), None), PlanMismatchError, r"layer.1.* and \d+ more"),
        (lambda: (pruned_model(), None), ConfigError, "went through this plan already"),
        (lambda: (tiny_model(), "reversed"), PlanMismatchError, "does not fit"),
        (lambda: (tiny_model(), "twice the first"), PlanMismatchError, "does not fit"),
    ],
)
@pytest.mark.parametrize("step", [None, 2])
def test_a_plan_that_does_not_fit_is_refused_before_the_first_step(changed, error, message, step, two_stages, tmp_path):
    model, order = changed()
    first, second = two_stages.stages
    stages = {None: (first,), "reversed": (second, first), "twice the first": (first, first)}[order]
    before = copy.deepcopy(model)
    pruner = HessianPruner(config(**QUICK), plan=PruningPlan(stages), step=step)
    trainer = make_trainer(tmp_path, model, pruner, max_steps=4)
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert_same(model, before)


def pruned_model():
    model = tiny_model()
    prune(model, batches(), config(**QUICK, prune_ratio=0.3))
    return model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected a config, or a plan to carry out, got neither"),
        ({"plan": PruningPlan(())}, "plan has no stage"),
        ({"plan": 3}, "plan must be a PruningPlan, a Decision, .* got int"),
        ({"plan": "two", "num_rounds": 3}, "the plan has 2 stages, each of which is a round, got num_rounds=3"),
        ({"plan": "two", "ramp": "cubic"}, "ramp says how units are chosen, and plan has chosen them"),
        ({"plan": "two", "step": 9, "regularise": {}}, "regularise says how units are chosen"),
        ({"plan": "two", "train_only_implants": True}, "needs implants, got .* a plan without any"),
    ],
)
def test_what_a_plan_leaves_no_room_for_is_refused_when_the_callback_is_made(given, message, two_stages):
    given = {**given, "plan": two_stages} if given.get("plan") == "two" else given
    with pytest.raises(ConfigError, match=message):
        HessianPruner(**given)


def test_a_dense_checkpoint_has_no_plan(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a checkpoint without a plan of hap_hf; give one that was pruned"):
        HessianPruner(plan=tmp_path)


def test_its_state_makes_the_same_callback(two_stages):
    pruner = HessianPruner(plan=two_stages, step=1, interval=2)
    again = HessianPruner(**pruner.state()["args"])
    assert again.state() == pruner.state()
    assert (
        again.state()
        != HessianPruner(
            plan=replace(two_stages, stages=two_stages.stages[:1], provenance=(), bypasses=()), step=1, interval=2
        ).state()
    )


def test_without_settings_what_is_left_makes_up_for_what_goes(tmp_path):
    plan = decision_for(tiny_model()).plan
    weight = "bert.encoder.layer.0.output.dense.weight"
    repaired = trained(tmp_path, plan=plan, batches=batches(), step=4).model.get_parameter(weight)
    plain = HapConfig(prune_ratio=0.5, compensate=False, progress=False)
    cut = trained(tmp_path, config=plain, plan=plan, batches=batches(), step=4).model.get_parameter(weight)
    assert repaired.shape == cut.shape
    assert not repaired.equal(cut)


def test_implants_of_a_plan_can_be_trained_alone(tmp_path):
    plan = decision_for(tiny_model(), implant_ratio=0.5).plan
    trainer = trained(tmp_path, config=config(**QUICK), plan=plan, step=1, train_only_implants=True)
    trainable = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable
    assert len(trainable) < len(list(trainer.model.parameters()))
