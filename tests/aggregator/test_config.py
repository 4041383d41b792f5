"""What is wrong in a job file is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic_core.core_schema import ErrorType

from aggregator.config import build_job, known_settings, read_job
from aggregator.errors import AggregatorError, ConfigError
from aggregator.personal import STRATEGIES
from aggregator.rounds import Policy
from protocol.messages import BaseModelInfo, Job, Message, Probe
from protocol.mistakes import MODEL_MISSING, RULES

BASE = BaseModelInfo(
    name="toy", sha256="0" * 64, parameters=1000, modules={"model.layers.0.q": (8, 6)}
)


@pytest.fixture
def description(tmp_path: Path) -> Path:
    path = tmp_path / "model.json"
    path.write_text(BASE.model_dump_json())
    return path


TRUST = 'rule = "trust-weights"\n'


def toml(description: Path, more: str = "") -> str:
    return f'job = "notes"\nmodel = "{description}"\n{more}'


def written(tmp_path: Path, text: str, name: str = "job.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_job_file(tmp_path: Path, description: Path) -> None:
    more = """
    rule = "fedavg"
    rounds = 20
    ladder = [2, 4]
    [training]
    steps = 50
    [policy]
    min_devices = 3
    deadline_s = 60
    """
    job, policy = read_job(written(tmp_path, toml(description, more)))
    assert (job.job, job.rule, job.rounds, job.rank, job.scale) == ("notes", "fedavg", 20, 4, 2.0)
    assert job.training.steps == 50
    assert job.base == BASE
    assert policy == Policy(min_devices=3, quorum=1, deadline_s=60, fraction=1.0)


def test_the_same_in_json(tmp_path: Path, description: Path) -> None:
    fields = {"job": "notes", "model": str(description), "policy": {"quorum": 2}}
    job, policy = read_job(written(tmp_path, json.dumps(fields), "job.json"))
    assert job.rule == "anchored"
    assert policy.quorum == 2


def test_the_text_of_a_probe_is_read_from_beside_the_job_file(
    tmp_path: Path, description: Path
) -> None:
    (tmp_path / "probe.txt").write_text("Wie schön.\n", encoding="utf-8")
    more = 'rule = "trust-predictions"\n[probe]\nfile = "probe.txt"\ntop_k = 7'
    job, _ = read_job(written(tmp_path, toml(description, more)))
    assert job.probe == Probe(text="Wie schön.\n", top_k=7)
    (tmp_path / "probe.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"probe\.txt is not UTF-8 text"):
        read_job(written(tmp_path, toml(description, more)))
    (tmp_path / "probe.txt").write_text("x" * 20_001)
    with pytest.raises(ConfigError, match=r"probe\.text: must have at most 20000 characters"):
        read_job(written(tmp_path, toml(description, more)))


@pytest.mark.parametrize("rule", STRATEGIES)
def test_the_strategies_of_personal_adapters_are_rules(description: Path, rule: str) -> None:
    fields = {"job": "notes", "model": str(description), "rule": rule, "probe": {"text": "a b"}}
    job, _ = build_job({**fields, "rule_settings": {"temperature": 0.2}}, "here")
    assert job.rule == rule


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("colour = 1", "'colour'"),
        ("rounds = 0", "rounds"),
        ('rounds = "many"', "rounds"),
        ("ladder = [4, 2]", "ladder"),
        ("ladder = []", "ladder"),
        ("ladder = 4", "ladder"),
        ("scale = -1.0", "scale"),
        ("scale = nan", "scale"),
        ('encoding_up = "f64"', "encoding_up"),
        ('remainder = "dropped"', "rotating"),
        ("training = 5", "training"),
        ("policy = 5", "policy: "),
        ("[training]\nsteps = 0", "training.steps"),
        ("[policy]\nmin_devices = 0", "policy.min_devices"),
        ("[policy]\nfraction = 1.5", "fraction"),
        ("[policy]\nkeep_versions = 1", "0 (all), or 2 and more"),
        ("[policy]\nkeep_versions = -1", "policy.keep_versions"),
        ("[policy]\ncolour = 1", "colour"),
        ("[pruning]\ngamma = 1.0", "pruning.gamma"),
        ("rounds = = 3", "job.toml"),
        ('rule = "no-such-rule"', "no-such-rule"),
        ("[rule_settings]\nsplt = 1", "rule_settings: the rule has no setting 'splt'"),
        (
            "[rule_settings]\nclip = 0",
            "rule_settings: clip: must be a number over 0 and below 1e30",
        ),
        ("[rule_settings]\nbyzantine = 1", "rule_settings: the rule has no setting 'byzantine'"),
        ("[rule_settings]\nmomentum = 1", "rule_settings: momentum: must be less than 1"),
        ('rule = "best"', "there are fedavg"),
        ('rule = "best"', "trust-predictions"),
        ('rule = "anchord"', "there is no merge rule 'anchord'; did you mean 'anchored'?"),
        ('rule = "trust_weights"', "did you mean 'trust-weights'?"),
        (f"{TRUST}[rule_settings]\ncandidate = 3", "did you mean 'candidates'?"),
        (f"{TRUST}[rule_settings]\nclip = 1.0", "no setting 'clip'; only a merge rule has it"),
        (f"{TRUST}[rule_settings]\ntemperature = 0", "temperature: must be a number over 0"),
        (f'{TRUST}directions = "top"\nremainder = "dropped"', "needs remainder = 'frozen'"),
        ('rule = "trust-predictions"', "[probe] with file"),
        ("[probe]\npositions = 2", "probe: needs a text, or a file that has it"),
        ('[probe]\ntext = "a"\nfile = "b"', "probe: has a text and a file"),
        ('[probe]\nfile = "not-there.txt"', "probe.file: there is no such file"),
        ('[probe]\nfile = "."', "probe.file: can't read"),
        ("[probe]\nfile = 3", "probe.file: must be the path of a text file"),
        ('[probe]\ntext = ""', "probe.text: must not be empty"),
        ('[probe]\ntext = "a"\ntop_k = 0', "probe.top_k: must be at least 1"),
        ('[probe]\ntext = "a"\ntopk = 2', "'probe.topk'; did you mean 'probe.top_k'?"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(
    tmp_path: Path, description: Path, more: str, said: str
) -> None:
    with pytest.raises(AggregatorError) as caught:
        read_job(written(tmp_path, toml(description, more)))
    assert not any(word in str(caught.value) for word in ("Value error", "Input", "Field"))
    assert isinstance(caught.value, ConfigError)
    assert said in str(caught.value)
    assert "job.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('rounds = "6"', 'rounds: must be a whole number, not "6"'),
        ("rounds = 6.0", "rounds: must be a whole number, not 6.0"),
        ("scale = true", "scale: must be a number, not true"),
        ("ladder = [2, true]", "ladder[1]: must be a whole number, not true"),
        ('[training]\nsteps = "6"', 'training.steps: must be a whole number, not "6"'),
        ("[training]\nlearning_rate = true", "training.learning_rate: must be a number, not true"),
        ("[pruning]\nenabled = 1", "pruning.enabled: must be true or false, not 1"),
        ("[limits]\nupload_bytes = true", "limits.upload_bytes: must be a whole number, not true"),
        ('[probe]\ntext = "a"\ntop_k = "3"', 'probe.top_k: must be a whole number, not "3"'),
        ("[policy]\nquorum = true", "policy.quorum: must be a whole number, not true"),
        ('[policy]\ndeadline_s = "60"', 'policy.deadline_s: must be a number, not "60"'),
        ("[rule_settings]\ncap = true", "rule_settings: cap: must be a number, not true"),
        ('[rule_settings]\ncap = "0.5"', 'rule_settings: cap: must be a number, not "0.5"'),
        ("[rule_settings]\nmomentum = true", "rule_settings: momentum: must be a number, not true"),
        (
            '[rule_settings]\nerror_feedback = "yes"',
            'rule_settings: error_feedback: must be true or false, not "yes"',
        ),
        (
            '[rule_settings]\nmemory_rank = "3"',
            'rule_settings: memory_rank: must be a whole number, not "3"',
        ),
        (
            f"{TRUST}[rule_settings]\ncandidates = true",
            "rule_settings: candidates: must be a whole number, not true",
        ),
    ],
)
def test_a_value_of_another_kind_is_refused_even_where_it_could_be_read(
    tmp_path: Path, description: Path, more: str, said: str
) -> None:
    path = written(tmp_path, toml(description, more))
    with pytest.raises(ConfigError) as caught:
        read_job(path)
    assert str(caught.value) == f"{path}: {said}"


def test_a_whole_number_is_a_number(tmp_path: Path, description: Path) -> None:
    more = """
    scale = 2
    rule_settings = { cap = 1, momentum = 0, clip = 3, discrepancy_offset = 0 }
    [training]
    learning_rate = 1
    [policy]
    deadline_s = 60
    """
    job, policy = read_job(written(tmp_path, toml(description, more)))
    assert (job.scale, job.training.learning_rate, policy.deadline_s) == (2.0, 1.0, 60.0)
    assert Job.model_validate_json(job.model_dump_json()) == job
    assert Job.model_validate({**job.model_dump(), "ladder": tuple(job.ladder)}) == job


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "ladder = [4, 2]",
            "ladder must be ascending ranks without repetition, say [2, 4, 8]",
        ),
        ("ladder = []", "ladder: must have an entry at least"),
        ("ladder = 4", "ladder: must be a list, not 4"),
        ("ladder = [2, 0]", "ladder[1]: must be at least 1, not 0"),
        ("ladder = [2, 2.5]", "ladder[1]: must be a whole number, not 2.5"),
        ("rounds = 0", "rounds: must be at least 1, not 0"),
        ('rounds = "many"', 'rounds: must be a whole number, not "many"'),
        ("scale = nan", "scale: must be a finite number, not NaN"),
        ("rule = 5", "rule: must be text, not 5"),
        (f'rule = "{"x" * 501}"', f'rule: must have at most 500 characters, not "{"x" * 38}…'),
        ('encoding_up = "f64"', "encoding_up: must be 'f32', 'bf16' or 'int8', not \"f64\""),
        (
            'remainder = "dropped"',
            "directions = 'rotating' needs remainder = 'frozen': a device that dropped the other "
            "directions has nothing to rotate over",
        ),
        (
            'layers = "fit"\ndirections = "top"\nremainder = "dropped"',
            "layers = 'fit' needs remainder = 'frozen': a device that dropped what it does not "
            "train would train its modules without all the others",
        ),
        (
            '[training]\nfactors = "A"',
            "training.factors: must be 'both' or 'alternating', not \"A\"",
        ),
        ("training = 5", "training: must be a table of settings, not 5"),
        ("policy = [1]", "policy: must be a table of settings"),
        ("[policy]\nfraction = 1.5", "policy.fraction: must be at most 1.0, not 1.5"),
        ('[pruning]\nenabled = "so"', 'pruning.enabled: must be true or false, not "so"'),
        ("[pruning]\ngamma = 1.0", "pruning.gamma: must be less than 1.0, not 1.0"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_allowed(
    tmp_path: Path, description: Path, more: str, said: str
) -> None:
    path = written(tmp_path, toml(description, more))
    with pytest.raises(ConfigError) as caught:
        read_job(path)
    assert str(caught.value) == f"{path}: {said}"


def test_every_wording_fits_what_pydantic_gives_for_it() -> None:
    """The names of kinds of errors, and of what fills a wording in, are pydantic's."""
    known = get_args(ErrorType)
    assert RULES.keys() <= set(known)


@pytest.mark.parametrize(
    ("more", "unknown", "meant"),
    [
        ("ruunds = 2", "ruunds", "rounds"),
        ("[training]\nstps = 2", "training.stps", "training.steps"),
        ("[pruning]\nrank-min = 2", "pruning.rank-min", "pruning.rank_min"),
        ("[limits]\nupload_byte = 2", "limits.upload_byte", "limits.upload_bytes"),
        ("[policy]\nquorums = 2", "policy.quorums", "policy.quorum"),
        ("[training]\nsteps = 2\nrounds = 2", "training.rounds", "rounds"),  # a slip in TOML
        ("steps = 2", "steps", "training.steps"),
        ('"training.steps" = 2', "training.steps", "training"),  # a name with a dot in it
        ("[training]\ncolour = 1", "training.colour", None),
        ("[training]\n'' = 1", "training.", None),
    ],
)
def test_a_setting_that_there_is_not_is_refused_with_the_nearest(
    tmp_path: Path, description: Path, more: str, unknown: str, meant: str | None
) -> None:
    path = written(tmp_path, toml(description, more))
    with pytest.raises(ConfigError) as caught:
        read_job(path)
    hint = f"did you mean {meant!r}?" if meant else "there are steps, tokens_per_step, "
    assert str(caught.value).startswith(f"{path}: there is no setting {unknown!r}; {hint}")


def test_an_inline_description_is_checked_too() -> None:
    base = {**BASE.model_dump(), "module": {}}
    with pytest.raises(ConfigError, match=r"'base\.module'; did you mean 'base\.modules'\?"):
        build_job({"job": "notes", "base": base}, "here")


def test_no_table_escapes_the_check() -> None:
    """Every message inside a job is a table of its own, and has no message in it again."""
    tables = known_settings()
    inner = [f.annotation for f in Job.model_fields.values()]
    models = [m for m in inner if isinstance(m, type) and issubclass(m, Message)]
    assert len(tables) == len(models) + 3
    assert {"", "policy", "probe"} <= tables.keys(), "of which one is a message or nothing"
    for model in models:
        kinds = [f.annotation for f in model.model_fields.values()]
        assert not any(isinstance(k, type) and issubclass(k, Message) for k in kinds)


def test_on_the_wire_unknown_fields_are_still_ignored() -> None:
    """So that a later version may add some."""
    job, _ = build_job({"job": "notes", "base": BASE.model_dump()}, "here")
    sent = job.model_dump() | {"colour": 1}
    sent["training"] |= {"momentum": 0.9}
    assert Job.model_validate_json(json.dumps(sent)) == job


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('job = "notes"\nrounds = = 3', "line 2 (rounds = = 3) is not TOML; write name = value"),
        ('job = "notes', 'line 1 (job = "notes) is not TOML'),
        ("job = notes", "line 1 (job = notes) is not TOML"),
        ("job = [", "line 1 (job = [) is not TOML"),
        ("rounds = 3\nrounds = 4", "line 2 (rounds = 4) sets what is set already"),
        ("[training]\n[policy]\n[training]", "line 3 ([training]) sets what is set already"),
    ],
)
def test_a_file_that_is_no_toml(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_job(path)
    assert str(caught.value).startswith(f"can't read the job file {path}: {said}")


def test_settings_are_checked_before_the_model_is_described() -> None:
    """Describing takes seconds, or a network."""
    with pytest.raises(ConfigError, match=r"^here: rounds: must be at least 1, not 0$"):
        build_job({"job": "notes", "model": "nowhere/nothing", "rounds": 0}, "here")
    with pytest.raises(ConfigError, match=r"^here: rule: there is no merge rule 'best'"):
        build_job({"job": "notes", "model": "nowhere/nothing", "rule": "best"}, "here")


@pytest.mark.parametrize("text", ["", "[1, 2]", "5", "null", '"job"', "{", "[" * 50_000])
def test_json_that_is_no_job(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.json") as caught:
        read_job(written(tmp_path, text, "job.json"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: there is no such file$"):
        read_job(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r": is a directory$"):
        read_job(tmp_path)
    (tmp_path / "bad.toml").write_bytes(b"rounds = 3\n# \xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bad\.toml: line 2 is not UTF-8 text"):
        read_job(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "job: is missing"),
        ({"job": "notes"}, MODEL_MISSING),
        (
            {"job": "Capitals", "model": ""},
            'job: must be 1 to 63 small letters, digits and inner dashes, not "Capitals"',
        ),
        ({"job": "notes", "base": {}}, "base.name: is missing"),
    ],
)
def test_a_field_that_is_missing_or_misnamed(
    fields: dict[str, Any], said: str, description: Path
) -> None:
    fields = {k: str(description) if k == "model" else v for k, v in fields.items()}
    with pytest.raises(ConfigError) as caught:
        build_job(fields, "here")
    assert str(caught.value) == f"here: {said}"


@pytest.mark.parametrize("text", ["{}", "no json", '{"name": "x"}'])
def test_a_description_that_describes_no_model(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text, "model.json")
    with pytest.raises(ConfigError, match=r"model description .*model\.json") as caught:
        build_job({"job": "notes", "model": str(path)}, "here")
    assert "\n" not in str(caught.value)
