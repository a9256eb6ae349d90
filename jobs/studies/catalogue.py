"""The studies that there are, by name."""

from __future__ import annotations

from jobs.studies.study import CalibrationTask, Claim, PolicyTask, RecallTaskSetting, Study, TargetTask, TextTask

_LONG, _SHORT = "at 2048", "at 128"
_TRAINED = "at 48"

POSITIONS = Study(
    title="Position schemes trained at 128 tokens and read at up to 2048",
    recipe="positions",
    task=TextTask(lengths=(128, 256, 512, 1024, 2048)),
    variants={
        "alibi": ["model.position_embedding_type=alibi"],
        "rope": ["model.position_embedding_type=rope"],
        "relative": ["model.position_embedding_type=relative"],
        "none": ["model.position_embedding_type=none"],
    },
    claims=[
        Claim("alibi", "alibi", _LONG, worse_measure=_SHORT, margin=0.02),
        Claim("alibi", "rope", _LONG),
        Claim("alibi", "none", _LONG),
    ],
    lower_is_better=True,
)

MEMORY = Study(
    title="Neural memory without attention: what each of its parts is good for",
    recipe="memory",
    task=TextTask(lengths=(128,)),
    variants={
        "full": [],
        "no persistent tokens": ["model.memory.num_persistent_tokens=0"],
        "linear memory": ["model.memory.depth=1"],
        "no convolution": ["model.memory.convolution=false"],
        "no momentum": ["model.memory.momentum=false"],
        "no forgetting": ["model.memory.forgetting=false"],
    },
    claims=[
        Claim("full", "no persistent tokens", _SHORT),
        Claim("no persistent tokens", "linear memory", _SHORT),
        Claim("no persistent tokens", "no convolution", _SHORT),
        Claim("linear memory", "no momentum", _SHORT),
        Claim("linear memory", "no forgetting", _SHORT),
        Claim("no convolution", "no momentum", _SHORT),
        Claim("no convolution", "no forgetting", _SHORT),
    ],
    lower_is_better=True,
    common=["model.mixer_types=memory", "train.steps=800"],
)

RECALL = Study(
    title="Associative recall from 41 tokens back and more, in two layers with windows of 16",
    recipe="hybrid",
    task=RecallTaskSetting(lengths=(48, 96), num_pairs=4, num_symbols=8),
    variants={
        "attention": ["model.mixer_types=attention"],
        "window": ["model.mixer_types=window"],
        "state space": ["model.mixer_types=ssm"],
        "hybrid": ["model.mixer_types=hybrid"],
        "memory": ["model.mixer_types=memory"],
        "memory and window": ["model.mixer_types=memory_gate"],
    },
    claims=[
        Claim("hybrid", "window", _TRAINED),
        Claim("hybrid", "state space", _TRAINED),
        Claim("memory and window", "window", _TRAINED),
        Claim("memory", "window", _TRAINED),
    ],
    lower_is_better=False,
    common=[
        "model.position_embedding_type=none",  # so that rows longer than those of training are nothing new
        "model.sliding_window=16",
        "train.sequence_length=48",
        "train.steps=1000",
    ],
)

EXPERTS = Study(
    title="Experts and a dense feed-forward that cost the same operations",
    recipe="experts",
    task=TextTask(lengths=(128,)),
    variants={
        "noisy top-2 of 8": [],
        "top-2 of 8 without noise": ["model.router_noise=false"],
        "dense": ["model.num_experts=0"],
    },
    claims=[
        Claim("noisy top-2 of 8", "dense", _SHORT),
        Claim("noisy top-2 of 8", "top-2 of 8 without noise", _SHORT),
    ],
    lower_is_better=True,
)

PATCHES = Study(
    title="Bytes in patches of about 4, cut where the text is hard to guess or by counting",
    recipe="bytes",
    task=TextTask(lengths=(256,), count_patches=True),
    variants={
        "entropy": ["model.patches.mode=entropy", "model.entropy_model={first}"],
        "static": ["model.patches.mode=static"],
        "words": ["model.patches.mode=space"],
    },
    claims=[Claim("entropy", "static", "at 256"), Claim("entropy", "words", "at 256")],
    lower_is_better=True,
    common=["train.steps=400", "train.warmup_steps=40"],
    first="entropy-model",
)


def policy_study(title: str, task: PolicyTask, common: list[str]) -> Study:
    """What policy-gradient algorithms make of one family of problems."""
    return Study(
        title=title,
        recipe="ppo",
        task=task,
        variants={
            "ppo": ["ppo.algorithm=ppo"],
            "grpo": [
                "ppo.algorithm=grpo",
                "ppo.prompts_per_iteration=32",
                "ppo.samples_per_prompt=8",
                "ppo.epochs=2",
            ],
            "reinforce": ["ppo.algorithm=reinforce", "ppo.epochs=null"],
        },
        claims=[
            Claim("ppo", "ppo", "after", worse_measure="before", margin=-0.2),
            Claim("grpo", "grpo", "after", worse_measure="before", margin=-0.2),
            Claim("ppo", "reinforce", "after"),
            Claim("grpo", "reinforce", "after"),
            Claim("ppo", "reinforce", "reward jitter", lower_is_better=True, share=0.5),
            Claim("ppo", "reinforce", "reward variance", lower_is_better=True, share=0.5),
        ],
        lower_is_better=False,
        common=common,
    )


POLICY = policy_study(
    "Spelling backward by trial and reward", PolicyTask(least_before=0.1, more_steps=15), ["train.steps=150"]
)
POLICY_ARITHMETIC = policy_study(
    "Sums of three numbers by trial and reward",
    PolicyTask(least_before=0.15, more_steps=25),
    [
        "tasks.family=basic_arithmetic",
        'tasks.config={min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1, operators: ["+", "-"], '
        "allow_parentheses: false, allow_negation: false}",
        "tasks.size=2400",  # with those held out nearly all that there are
        "train.steps=250",
        "train.sequence_length=32",
        "ppo.max_new_tokens=6",
        "ppo.minibatch=128",
        "ppo.temperature=0.7",
        "ppo.iterations=300",
    ],
)

_TARGET, _WITHIN = 0.4, 600
_UNTIL = f"advance: {{when: threshold, metric: held_out_accuracy, threshold: {_TARGET}, times: 1}}"


def _promoted(name: str, level: int, upto: float) -> str:
    """A stage of the levels up to this one, which ends when half of its problems are solved."""
    metric = f"held_out_accuracy.level_{level}.words"
    rule = f"advance: {{when: threshold, metric: {metric}, threshold: 0.5, times: 1}}"
    return f"{{name: {name}, steps: 200, difficulty: [0, {upto}], {rule}}}"


CURRICULUM = Study(
    title=f"Words of three lengths spelled backward, until {_TARGET:.0%} of those held out are right",
    recipe="curriculum",
    task=TargetTask("held_out_accuracy", _TARGET, _WITHIN),
    variants={
        "all at once": [f"train.stages=[{{name: all, steps: {_WITHIN}, {_UNTIL}}}]"],
        "fixed stages": [
            "train.stages=[{name: short, steps: 80, difficulty: [0, 0.333]}, "
            f"{{name: longer, steps: 80, difficulty: [0, 0.667]}}, {{name: all, steps: {_WITHIN - 160}, {_UNTIL}}}]"
        ],
        "competence": [
            f"train.stages=[{{name: all, steps: {_WITHIN}, {_UNTIL}, "
            "pacing: {kind: root, start: 0.333, over: 0.333}}]"
        ],
        "success gating": [
            f"train.stages=[{_promoted('short', 1, 0.333)}, {_promoted('longer', 2, 0.667)}, "
            f"{{name: all, steps: {_WITHIN}, {_UNTIL}}}]"
        ],
    },
    claims=[
        Claim(variant, "all at once", "steps", share=share)
        for share in (1.0, 0.5)
        for variant in ("fixed stages", "competence", "success gating")
    ],
    lower_is_better=True,
)

CALIBRATION = Study(
    title="A loss for calibration beside language modelling",
    recipe="calibration",
    task=CalibrationTask(),
    variants={
        "language model": ["objectives.weights={calibration: 0}"],
        "soft bins": ["objectives.weights={calibration: 0.5}"],
        "mmce": ["objectives.weights={calibration: 0.5}", "objectives.calibration=mmce"],
        "brier": ["objectives.weights={calibration: 0.5}", "objectives.calibration=brier"],
    },
    claims=[
        Claim("soft bins", "language model", "error"),
        Claim("mmce", "language model", "error"),
        Claim("brier", "language model", "error"),
        Claim("language model", "language model", "scaled error", worse_measure="error"),
        Claim("soft bins", "language model", "scaled error", worse_measure="error"),
    ],
    lower_is_better=True,
)

STUDIES: dict[str, Study] = {
    "positions": POSITIONS,
    "memory": MEMORY,
    "recall": RECALL,
    "experts": EXPERTS,
    "patches": PATCHES,
    "policy": POLICY,
    "policy-arithmetic": POLICY_ARITHMETIC,
    "curriculum": CURRICULUM,
    "calibration": CALIBRATION,
}
