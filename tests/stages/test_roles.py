"""Who is who in a run is told from the files themselves, and who cannot have a part is refused."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from salt_jax.checkpoint import open_checkpoints, save
from salt_jax.checkpoint_files import checkpoint_digest
from salt_jax.config.reading import read_recipe, to_json
from salt_jax.errors import UserError
from salt_jax.io.shipped import located
from salt_jax.io.tensor_files import save_weights
from salt_jax.models.presets import PRESETS
from salt_jax.stages import STAGES, make_stage
from salt_jax.stages.record import read_record
from salt_jax.stages.roles import (
    Role,
    going_on,
    read_roles,
    refuse_another_base,
    refuse_changed,
    refuse_roles,
    roles,
    table,
    write_roles,
)
from salt_jax.state import init_learner, init_state

TEACHER, CAUSAL = "shapes_teacher", "shapes_causal"
LORA = {"video": "rollout", "lora.rank": 4, "lora.alpha": 4.0}
WAN = {"data.kind": "latents", "data.clip": (3, 4, 6), "text_encoder": "wan-tiny", "weights": ""}
WAN |= {"model.preset": "wan2.1-t2v-tiny"}


def recipe(**changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    return read_recipe(config)


def stage(**changes):
    return make_stage(recipe(**changes))


def file(path, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, {"w": np.arange(3.0)}, "float32", metadata)
    return str(path)


def exported(path, **changes):
    return file(path, config=to_json(recipe(**changes)))


def workdir(path, step=3, **changes):
    learner = init_learner({"w": jnp.arange(3.0)}, optax.sgd(0.1))
    state = init_state({"student": learner, "critic": learner})
    with open_checkpoints(path, 1) as manager:
        save(manager, replace(state, iteration=jnp.int32(step)), {})
    (path / "config.json").write_text(to_json(recipe(**changes)))
    return str(path)


def sha(path):
    return hashlib.sha256(located(path).read_bytes()).hexdigest()


def by_name(found):
    assert len({r.name for r in found}) == len(found)
    return {r.name: r for r in found}


def test_the_parts_of_a_distillation_and_what_their_files_say():
    found = by_name(roles(stage(video="rollout", init_from=CAUSAL)))
    assert set(found) == {"student", "critic", "teacher", "text encoder"}
    student, teacher = found["student"], found["teacher"]
    assert student[1:5] == (CAUSAL, None, sha(CAUSAL), "causal")
    assert student.trained == (
        "consistency on moving_shapes, 8 levels of shift 5.0, "
        "from runs/results/causal/stages/teacher_forcing/0"
    )
    assert teacher[1:] == (
        TEACHER,
        None,
        sha(TEACHER),
        "bidirectional",
        "denoising on moving_shapes",
    )
    assert (
        found["critic"][1:]
        == teacher[1:]
        == found["text encoder"]._replace(sees="bidirectional")[1:]
    )


def test_the_parts_of_other_runs():
    found = by_name(roles(stage(**LORA, **{"align.weight": 0.5})))
    assert (
        found["student"].source == "fresh adapter of rank 4 (seed 0)"
        and not found["student"].digest
    )
    for name in ("student's base", "critic's base", "alignment", "teacher"):
        assert found[name].digest == sha(TEACHER)
    found = by_name(roles(stage(stage="consistency", init_from=CAUSAL)))
    assert set(found) == {"student", "causal teacher", "text encoder"}
    assert found["causal teacher"].source == CAUSAL and found["text encoder"].source == TEACHER
    found = by_name(roles(stage(weights="", seed=7, **{"teacher.kind": "closed_form"})))
    assert found["student"].source == "fresh (seed 7)" and found["student"].sees == "-"
    assert found["teacher"].source == "closed form of the world"
    found = by_name(roles(stage(stage="denoising", weights="", **{"teacher.kind": "data"})))
    assert set(found) == {"student", "teacher", "text encoder"}
    found = by_name(roles(stage(**{"teacher.preset": "small", "teacher.weights": CAUSAL})))
    assert found["teacher"].digest == sha(CAUSAL) != found["critic"].digest


def test_the_texts_of_encoded_data_know_their_encoder(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"text_encoder.safetensors": "abc"}))
    found = by_name(roles(stage(**WAN, **{"data.dir": str(tmp_path)})))
    assert found["text encoder"][1:4] == (str(tmp_path), None, "abc")


def test_a_workdir_has_a_step_and_a_lora_what_is_below_it(tmp_path):
    one = workdir(tmp_path / "one", step=5, **LORA, init_from=CAUSAL)
    two = workdir(tmp_path / "two", step=6, **LORA, init_from=one)
    found = by_name(roles(stage(video="rollout", init_from=two)))
    assert found["student"][1:5] == (two, 6, checkpoint_digest(two, 6, "ema"), "causal")
    assert "LoRA of rank 4" in found["student"].trained
    assert found["base of the start"][1:3] == (one, 5)
    assert found["base of base of the start"][1:4] == (CAUSAL, None, sha(CAUSAL))
    (tmp_path / "one" / "config.json").write_text(to_json(recipe(**LORA, init_from=two)))
    with pytest.raises(UserError, match=r"config\.init_from=\S+two leads back to \S+two"):
        refuse_roles(stage(video="rollout", init_from=two))


def test_a_critic_that_is_carried_over_is_that_of_the_workdir(tmp_path):
    where = workdir(tmp_path / "run", step=5, video="rollout")
    carried = {"video": "rollout", "init_from": where, "init_critic": True}
    critic = by_name(roles(stage(**carried)))["critic"]
    assert critic[1:5] == (where, 5, checkpoint_digest(where, 5, "critic"), "bidirectional")
    assert critic.trained.startswith("critic of: distil on moving_shapes")
    found = by_name(roles(stage(**LORA | carried)))
    assert found["critic's base"][1:] == critic[1:] and not found["critic"].digest
    other = by_name(roles(stage(**carried | {"init_critic": False})))["critic"]
    assert other.source == TEACHER


def test_a_vae_that_encodes_in_training_is_known_by_its_file(tmp_path):
    """Beside the network, where that is a folder and where it is a file in it."""
    streamed = {"memory.chunk": 1, "memory.first": 1, "memory.window": 3, "memory.sink": 1}
    streamed |= {"video": "rollout", "stream.max_frames": 9, "stream.overlap": 1}
    told = {"config": OFFICIAL}
    wan, vae = (file(tmp_path / f"{name}.safetensors", **told) for name in ("wan", "vae"))
    save_weights(vae, {"w": np.ones(3)}, "float32", told)
    for where in (str(tmp_path), wan):
        changes = WAN | streamed | {"weights": where, "data.dir": str(tmp_path)}
        assert "VAE" not in by_name(roles(stage(**changes)))
        found = by_name(roles(stage(**changes, **{"stream.reencode": 2})))["VAE"]
        assert found[1:5] == (where, None, sha(vae), "-") and sha(vae) != sha(wan)


STUDENT = {"video": "rollout", "schedule.shift": 5.0}
OFFICIAL = json.dumps(asdict(PRESETS["wan2.1-t2v-tiny"]))
RUN = json.loads(to_json(recipe(**STUDENT)))
STUDENTS = {
    "export": {"config": to_json(recipe(**STUDENT))},
    "export of whole clips": {"config": to_json(recipe())},
    "export with a LoRA": {"config": to_json(recipe(**LORA))},
    "record": {"config": OFFICIAL, "salt_jax": json.dumps({"config": RUN, "step": 40})},
    "record in words": {
        "config": OFFICIAL,
        "salt_jax": json.dumps({"config": json.dumps(RUN), "step": 40}),
    },
    "converted": {
        "config": OFFICIAL,
        "source": json.dumps({"told": "official names", "student": "generator"}),
    },
    "converted before": {
        "config": OFFICIAL,
        "source": json.dumps({"told": "official names, generator_ema of the file"}),
    },
}
for name in sorted(STAGES.keys() - {"denoising"}):
    STUDENTS[f"export of {name}"] = {"config": to_json(recipe(stage=name))}
for key in ("generator_ema", "model", "0.student_ema"):
    STUDENTS[key] = {
        "config": OFFICIAL,
        "source": json.dumps({"told": "official names", "student": key}),
    }
TEACHERS = {
    "wrapped": {
        "config": OFFICIAL,
        "source": json.dumps({"told": "state_dict of the file", "student": "state_dict"}),
    },
    "teacher-to-be": {"config": to_json(recipe(stage="denoising", **{"teacher.kind": "data"}))},
    "official": {
        "config": OFFICIAL,
        "source": json.dumps({"told": "official names", "student": ""}),
    },
    "record of one": {
        "config": OFFICIAL,
        "salt_jax": json.dumps({"config": RUN | {"stage": "denoising"}, "step": 3}),
    },
    "nothing told": {},
    "garbage": {"config": "[" * 100_000, "salt_jax": "3", "source": "{"},
}


@pytest.mark.parametrize("metadata", STUDENTS.values(), ids=STUDENTS)
@pytest.mark.parametrize("key", ["weights", "teacher.weights"])
def test_a_file_that_says_it_is_a_student_does_not_teach_unless_told(tmp_path, metadata, key):
    where = file(tmp_path / "student.safetensors", **metadata)
    with pytest.raises(
        UserError, match=rf"config\.{key}=\S+student\.safetensors would be the teacher"
    ) as error:
        refuse_roles(stage(**{key: where}))
    assert "\n" not in str(error.value) and "config.teacher.accept_student=True" in str(error.value)
    refuse_roles(stage(**{key: where, "teacher.accept_student": True}))
    if key == "weights":  # it does not teach
        refuse_roles(stage(weights=where, **{"teacher.kind": "closed_form"}))
        refuse_roles(stage(weights=where, stage="teacher_forcing"))
        refuse_roles(stage(weights=where, **{"teacher.weights": TEACHER}))


def test_a_converted_student_in_a_folder_does_not_teach(tmp_path):
    file(tmp_path / "sf" / "wan.safetensors", **STUDENTS["converted"])
    with pytest.raises(UserError, match=r"config\.teacher\.weights=\S+sf would be the teacher"):
        refuse_roles(stage(**WAN, **{"teacher.weights": str(tmp_path / "sf")}))


@pytest.mark.parametrize("metadata", TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_or_a_file_that_does_not_tell_may_teach(tmp_path, metadata):
    refuse_roles(stage(weights=file(tmp_path / "t.safetensors", **metadata)))
    refuse_roles(stage(weights=str(tmp_path / "absent")))  # its reader says so


def test_records_tell_the_step_and_how_a_file_was_taken_in(tmp_path):
    where = file(tmp_path / "a.safetensors", **STUDENTS["record"])
    assert read_record(where).step == 40 and read_record(where).sees == "causal"
    where = file(tmp_path / "b.safetensors", **TEACHERS["official"])
    assert (read_record(where).sees, read_record(where).made) == (
        "not recorded",
        "converted: official names",
    )
    listed = {
        "schedule.levels": (1000, 757, 522),
        "schedule.train_levels": 3,
        "schedule.anchor_levels": 3,
    }
    where = exported(
        tmp_path / "c.safetensors",
        **STUDENT | listed | {"video": "noised_chunks", "sample.num_steps": (3,)},
    )
    assert read_record(where).made == "distil on moving_shapes, levels 1000 757 522"


LISTED = {
    "schedule.levels": (1000, 757, 522),
    "schedule.train_levels": 3,
    "schedule.anchor_levels": 3,
    "rollout.num_steps": (3,),
    "rollout.probabilities": (1.0,),
    "sample.num_steps": (3,),
    "loss.self_consistency": 0.0,
}
OTHER_LEVELS = {
    "another shift": ({"schedule.shift": 5.0}, {"schedule.shift": 8.0}, "shift 5.0", "shift 8.0"),
    "listed before": (LISTED, {"schedule.shift": 12.0}, "levels 1000 757 522", "shift 12.0"),
    "listed now": ({"schedule.shift": 8.0}, LISTED, "shift 8.0", "levels 1000 757 522"),
    "others listed": (
        LISTED,
        LISTED | {"schedule.levels": (1000, 750, 500)},
        "levels 1000 757 522",
        "levels 1000 750 500",
    ),
}


@pytest.mark.parametrize("made_by", ["ode_regression", "consistency", "distil"])
@pytest.mark.parametrize(
    ("before", "now", "was", "has"), OTHER_LEVELS.values(), ids=OTHER_LEVELS.keys()
)
def test_a_few_step_start_of_other_levels_is_refused_unless_accepted(
    tmp_path, made_by, before, now, was, has
):
    where = exported(tmp_path / "start.safetensors", stage=made_by, video="rollout", **before)
    start = {"video": "rollout", "init_from": where}
    with pytest.raises(
        UserError, match=rf"config\.init_from=\S+start\.safetensors was trained at {was}, .*{has}"
    ) as error:
        refuse_roles(stage(**start, **now))
    assert "\n" not in str(error.value) and "config.accept_shift=True" in str(error.value)
    refuse_roles(stage(**start, **now, accept_shift=True))
    refuse_roles(stage(**start, **before))  # its own levels


def test_a_start_that_denoises_from_any_level_or_says_none_has_no_levels_to_compare(tmp_path):
    now = {"video": "rollout", "schedule.shift": 8.0}
    where = exported(tmp_path / "a.safetensors", stage="teacher_forcing")
    refuse_roles(stage(**now, init_from=where))
    where = file(tmp_path / "b.safetensors", **STUDENTS["converted"])
    refuse_roles(stage(**now, init_from=where))
    few = exported(tmp_path / "c.safetensors", stage="consistency")
    refuse_roles(stage(stage="teacher_forcing", init_from=few, **{"schedule.shift": 8.0}))
    # a workdir says the same as a file, and a list may have the 0 at the end
    run = workdir(tmp_path / "run", stage="consistency", **{"schedule.shift": 5.0})
    with pytest.raises(UserError, match=r"run was trained at shift 5\.0"):
        refuse_roles(stage(**now, init_from=run))
    zero = {"stage": "consistency", "schedule.levels": (1000, 757, 522, 0)}
    where = exported(tmp_path / "d.safetensors", **LISTED | zero)
    refuse_roles(stage(video="rollout", init_from=where, **LISTED))


@pytest.mark.parametrize("key", ["weights", "teacher.weights"])
def test_a_workdir_is_no_file_of_weights(tmp_path, key):
    where = workdir(tmp_path / "run")
    with pytest.raises(UserError, match=rf"config\.{key}=\S+run is a workdir; .*launch\.export"):
        refuse_roles(stage(**{key: where}))


def test_the_table_is_aligned_and_cuts_digests():
    found = [
        Role("student", "a.safetensors", 40, "0123456789abcdef", "causal", "x"),
        Role("t", "b", None, "", "-", "y"),
    ]
    assert table(found).splitlines() == [
        "part     from           step  sha256        sees    trained",
        "student  a.safetensors  40    0123456789ab  causal  x",
        "t        b              -     -             -       y",
    ]


def test_what_is_under_training_goes_on_from_its_own_checkpoint(tmp_path):
    where = workdir(tmp_path / "run", step=3)
    found = by_name(going_on(roles(stage(**LORA)), recipe(**LORA), where, 3))
    assert found["student"][1:4] == (where, 3, checkpoint_digest(where, 3, "student"))
    assert found["critic"].digest == checkpoint_digest(where, 3, "critic")
    assert found["student"].sees == "causal" and found["critic"].sees == "bidirectional"
    assert found["student"].trained == "this run, from fresh adapter of rank 4 (seed 0)"
    assert found["teacher"].source == TEACHER


def test_parts_are_kept_and_compared_by_what_is_in_their_files(tmp_path):
    first = file(tmp_path / "a.safetensors")
    write_roles(tmp_path, roles(stage(weights=first)))
    was = read_roles(tmp_path)
    assert was == roles(stage(weights=first)) and read_roles(tmp_path / "nowhere") == []
    moved = Path(first).rename(tmp_path / "b.safetensors")
    refuse_changed(was, roles(stage(weights=str(moved))))
    save_weights(moved, {"w": np.zeros(3)}, "float32", {})
    for changed in (
        {"weights": str(moved)},
        {"weights": ""},
        {"weights": str(tmp_path / "absent")},
    ):
        with pytest.raises(
            UserError, match=r"the student of this run is .* and was \S+a\.safetensors .*--workdir"
        ):
            refuse_changed(was, roles(stage(**changed)))
    (tmp_path / "roles.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"roles\.json is damaged"):
        read_roles(tmp_path)


def test_a_lora_whose_base_was_replaced_is_refused(tmp_path):
    """Its product belongs to the old one."""
    weights = file(tmp_path / "w.safetensors")
    adapted = recipe(**LORA, weights=weights)
    where = workdir(tmp_path / "run", **LORA, weights=weights)
    refuse_another_base(where, adapted)  # of an earlier version, which did not keep it
    write_roles(where, roles(make_stage(adapted)))
    refuse_another_base(where, adapted)
    refuse_another_base(where, adapted, "critic")
    save_weights(weights, {"w": np.zeros(3)}, "float32", {})
    with pytest.raises(
        UserError, match=r"the student's base of \S+run is .* put the old file back"
    ):
        refuse_another_base(where, adapted)
    with pytest.raises(UserError, match=r"the critic's base of \S+run is"):
        refuse_another_base(where, adapted, "critic")
