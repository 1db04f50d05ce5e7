"""The elastic batch arithmetic: the specification's values, and properties against brute force."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_core.config import ConfigError, find_problems, load_config
from ds_core.config.elastic import (
    HIGHLY_COMPOSITE,
    ElasticityConfigError,
    ElasticityError,
    ElasticityIncompatibleWorldSize,
    ElasticPlan,
    check_elasticity,
    check_scheduler,
    elastic_sizes,
)
from ds_core.config.sections.elasticity import ElasticitySection

# The deadline of hypothesis would measure the machine.
anywhere = settings(deadline=None)
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
TEN_THOUSAND = {"max_train_batch_size": 10000, "micro_batch_sizes": [8, 12, 16, 17]}


def section(**keys: Any) -> ElasticitySection:
    return ElasticitySection.model_validate({"enabled": True, **keys})


def test_the_check_values_of_version_1() -> None:
    ten_thousand = section(**TEN_THOUSAND, min_gpus=32, max_gpus=1500, version=0.1)
    plan = elastic_sizes(ten_thousand, None)
    assert plan.train == 9792
    assert plan.valid_dp_sizes[:6] == (32, 34, 36, 48, 51, 64)
    assert plan.valid_dp_sizes[-2:] == (816, 1224)
    assert len(plan.valid_dp_sizes) == 23
    assert plan.micro is plan.accumulation is None
    assert elastic_sizes(ten_thousand, 64) == ElasticPlan(9792, 17, 9, plan.valid_dp_sizes)
    four = section(max_train_batch_size=4, micro_batch_sizes=[1, 2, 3, 4], max_gpus=4, version=0.1)
    assert elastic_sizes(four, None) == ElasticPlan(4, None, None, (1, 2, 4))


def test_the_check_values_of_version_2() -> None:
    nodes = section(**TEN_THOUSAND, num_gpus_per_node=8, model_parallel_size=2)
    plan = elastic_sizes(nodes, 16 // 2)
    assert (plan.train, plan.micro, plan.accumulation) == (8640, 12, 90)
    assert (len(plan.valid_dp_sizes), plan.valid_dp_sizes[:3], plan.valid_dp_sizes[-1]) == (22, (4, 8, 12), 1080)
    assert plan.is_shared


def test_the_tried_factors_have_more_divisors_than_any_smaller_number() -> None:
    divisors = [0] * 10081
    for one in range(1, 10081):
        for multiple in range(one, 10081, one):
            divisors[multiple] += 1
    smaller = [0, *itertools.accumulate(divisors[1:], max)]
    records = [number for number in range(1, 10081) if divisors[number] > smaller[number - 1]]
    assert [number for number in HIGHLY_COMPOSITE if number <= 10080] == records
    assert (len(HIGHLY_COMPOSITE), HIGHLY_COMPOSITE[-1]) == (38, 720720)


SECTIONS = st.builds(
    lambda micro, spare, least, more, version, per_node, parallel, larger: section(
        max_train_batch_size=max(micro) + spare,
        micro_batch_sizes=micro,
        min_gpus=least,
        max_gpus=least + more,
        version=version,
        num_gpus_per_node=per_node * parallel if version == 0.2 else 1,
        model_parallel_size=parallel if version == 0.2 else 1,
        prefer_larger_batch=larger,
    ),
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(0, 400),
    st.integers(1, 12),
    st.integers(0, 60) | st.just(9999),
    st.sampled_from([0.1, 0.2]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)


def candidates(section: ElasticitySection) -> dict[int, list[int]]:
    """Return batch -> valid data-parallel sizes for every candidate, by trying all numbers of nodes."""
    nodes = section.version == 0.2
    gpus = section.num_gpus_per_node if nodes else 1
    replicas = gpus // section.model_parallel_size
    most = section.max_train_batch_size // replicas
    micro = section.micro_batch_sizes
    if max(micro) > most:
        return {}
    found = {}
    for base in {*micro, math.lcm(*micro)}:
        if base <= most:
            batch = base * [factor for factor in HIGHLY_COMPOSITE if base * factor <= most][-1]
            found[batch * replicas] = [
                n * replicas
                for n in range(1, batch + 1)
                if section.min_gpus // gpus <= n <= section.max_gpus // gpus
                and any(batch % (size * n) == 0 for size in micro)
            ]
    return found


@anywhere
@given(SECTIONS)
def test_the_batch_divides_among_every_valid_number_of_ranks_and_no_candidate_has_more(
    section: ElasticitySection,
) -> None:
    possible = candidates(section)
    most = max(map(len, possible.values()), default=0)
    try:
        plan = elastic_sizes(section, None)
    except ElasticityConfigError:
        assert most == 0
        return
    best = [batch for batch, sizes in possible.items() if len(sizes) == most]
    assert plan.train == (max(best) if section.prefer_larger_batch else min(best))
    assert list(plan.valid_dp_sizes) == possible[plan.train] != []
    assert 0 < plan.train <= section.max_train_batch_size
    for ranks in plan.valid_dp_sizes:
        assert type(ranks) is int
        assert any(plan.train % (size * ranks) == 0 for size in section.micro_batch_sizes)
        gpus = ranks * section.model_parallel_size
        assert section.version == 0.1 or gpus % section.num_gpus_per_node == 0


@anywhere
@given(SECTIONS, st.integers(1, 80))
# The batch of 0 that DeepSpeed finds, nodes that are not whole, and two things wrong at once.
@example(section(max_train_batch_size=1, micro_batch_sizes=[1], num_gpus_per_node=2, max_gpus=1), 1)
@example(section(max_train_batch_size=1, micro_batch_sizes=[1], num_gpus_per_node=2), 5)
@example(section(max_train_batch_size=100, micro_batch_sizes=[8, 12], num_gpus_per_node=8), 24)
@example(section(max_train_batch_size=100, micro_batch_sizes=[8, 12], num_gpus_per_node=4), 5)
@example(section(max_train_batch_size=100, micro_batch_sizes=[1, 12], prefer_larger_batch=False), 70)
def test_the_sizes_of_a_job_fit_or_every_fix_of_the_error_is_one(section: ElasticitySection, ranks: int) -> None:
    try:
        plan = elastic_sizes(section, ranks)
    except ElasticityError as error:
        assert_nothing_fits(section, ranks)
        for changed, others in applied(error.fix, section, ranks):
            fixed = elastic_sizes(changed, others)
            assert fixed.train == fixed.micro * fixed.accumulation * others
        return
    assert plan.micro in section.micro_batch_sizes
    assert plan.train == plan.micro * plan.accumulation * ranks
    assert 0 < plan.train <= section.max_train_batch_size
    assert ranks in plan.valid_dp_sizes
    fitting = [size for size in section.micro_batch_sizes if plan.train % (size * ranks) == 0]
    wants_first = section.version == 0.2 and not section.prefer_larger_batch
    assert plan.micro == (fitting[0] if wants_first else max(fitting))
    shared = elastic_sizes(section, None)
    assert plan.is_shared == (ranks in shared.valid_dp_sizes)
    if plan.is_shared:
        assert (plan.train, plan.valid_dp_sizes) == (shared.train, shared.valid_dp_sizes)
    else:
        sizes = section.micro_batch_sizes
        fits = {size * ranks * (section.max_train_batch_size // (size * ranks)) for size in sizes} - {0}
        assert plan.train == (max(fits) if section.prefer_larger_batch else min(fits))


def assert_nothing_fits(section: ElasticitySection, ranks: int) -> None:
    possible = candidates(section)
    most = max(map(len, possible.values()), default=0)
    if most == 0:
        return
    best = [batch for batch, sizes in possible.items() if len(sizes) == most]
    valid = possible[max(best) if section.prefer_larger_batch else min(best)]
    assert ranks not in valid
    if section.version == 0.2:
        is_whole = ranks * section.model_parallel_size % section.num_gpus_per_node == 0
        assert not is_whole or min(section.micro_batch_sizes) * ranks > section.max_train_batch_size


def applied(fix: str | None, section: ElasticitySection, ranks: int) -> list[tuple[ElasticitySection, int]]:
    """Return ``section`` and ``ranks`` once for every way to fix them that ``fix`` proposes."""
    assert fix, "an error of the arithmetic comes with a fix"
    found = []
    for way in fix.split(", or "):
        changes: dict[str, Any] = {}
        others = ranks
        for part in way.split(" and "):
            if match := re.fullmatch(r"set elasticity\.(\w+) to (.+)", part):
                changes[match[1]] = json.loads(match[2])
            else:
                match = re.fullmatch(r"run on (\d+) data-parallel ranks?(?: \((\d+) GPUs\))?", part)
                assert match, f"not a fix that can be applied: {part!r}"
                others = int(match[1])
                assert match[2] is None or int(match[2]) == others * section.model_parallel_size
        assert changes or others != ranks
        found.append((ElasticitySection.model_validate({**section.model_dump(), **changes}), others))
    return found


ERRORS = [
    (
        {"max_train_batch_size": 100, "micro_batch_sizes": [8, 12], "num_gpus_per_node": 8},
        24,
        ElasticityIncompatibleWorldSize,
        (
            "elasticity: 24 data-parallel ranks take 8 x 24 = 192 samples at the smallest of micro_batch_sizes, more"
            " than max_train_batch_size, 100"
        ),
        "run on 8 data-parallel ranks, or set elasticity.max_train_batch_size to 192",
    ),
    (
        {"max_train_batch_size": 1000, "micro_batch_sizes": [4], "num_gpus_per_node": 8, "model_parallel_size": 2},
        5,
        ElasticityIncompatibleWorldSize,
        "elasticity: 5 data-parallel ranks are not whole nodes of 4 (num_gpus_per_node / model_parallel_size = 8 / 2)",
        "run on 4 data-parallel ranks (8 GPUs), or run on 8 data-parallel ranks (16 GPUs)",
    ),
    (
        {"max_train_batch_size": 50, "micro_batch_sizes": [4, 12], "num_gpus_per_node": 8},
        8,
        ElasticityConfigError,
        (
            "elasticity.micro_batch_sizes: 12 x 8 data-parallel ranks of a node = 96 samples are more than"
            " max_train_batch_size, 50"
        ),
        "set elasticity.max_train_batch_size to 96, or set elasticity.micro_batch_sizes to [4]",
    ),
    (
        {"max_train_batch_size": 5, "micro_batch_sizes": [4, 6], "version": 0.1},
        1,
        ElasticityConfigError,
        "elasticity.micro_batch_sizes: 6 samples are more than max_train_batch_size, 5",
        "set elasticity.max_train_batch_size to 6, or set elasticity.micro_batch_sizes to [4]",
    ),
    (
        {"max_train_batch_size": 50, "micro_batch_sizes": [4], "num_gpus_per_node": 8, "max_gpus": 4},
        8,
        ElasticityConfigError,
        (
            "elasticity.max_train_batch_size: no batch up to 50 of micro-batches [4] divides among any number of GPUs"
            " from 1 to 4 in whole nodes of 8"
        ),
        "set elasticity.max_gpus to 8",
    ),
    (
        {"max_train_batch_size": 50, "micro_batch_sizes": [4], "version": 0.1, "min_gpus": 5, "max_gpus": 5},
        5,
        ElasticityConfigError,
        "elasticity.max_train_batch_size: no batch up to 50 of micro-batches [4] divides among 5 GPUs",
        (
            "set elasticity.min_gpus to 4 and run on 4 data-parallel ranks, or set elasticity.max_gpus to 6 and run on"
            " 6 data-parallel ranks"
        ),
    ),
    (
        {"max_train_batch_size": 50, "micro_batch_sizes": [4], "version": 0.1},
        7,
        ElasticityIncompatibleWorldSize,
        "elasticity: 7 data-parallel ranks cannot share the elastic batch of 48; valid are 1, 2, 3, 4, 6, 12",
        "run on 6 data-parallel ranks, or run on 12 data-parallel ranks",
    ),
    (
        {**TEN_THOUSAND, "version": 0.1},
        7,
        ElasticityIncompatibleWorldSize,
        (
            "elasticity: 7 data-parallel ranks cannot share the elastic batch of 8640; valid are 1, 2, 3, 4, 5, 6, 8,"
            " 9, 10, 12, 15, 16, 18, 20, 24, 27, 30, 36, 40, 45, ... 1080 (38 of them)"
        ),
        "run on 6 data-parallel ranks, or run on 8 data-parallel ranks",
    ),
    (
        {"max_train_batch_size": 50, "micro_batch_sizes": [4], "min_gpus": 3, "max_gpus": 2},
        1,
        ElasticityConfigError,
        "elasticity.min_gpus: got 3, more than max_gpus, 2",
        "set elasticity.min_gpus to 2, or set elasticity.max_gpus to 3",
    ),
    (
        {"max_train_batch_size": 50, "micro_batch_sizes": [4], "model_parallel_size": 3, "num_gpus_per_node": 8},
        1,
        ElasticityConfigError,
        "elasticity.num_gpus_per_node: got 8, not a multiple of model_parallel_size, 3",
        "set elasticity.num_gpus_per_node to 9, or set elasticity.model_parallel_size to 2",
    ),
    (
        {
            "max_train_batch_size": 50,
            "micro_batch_sizes": [4],
            "model_parallel_size": 2,
            "num_gpus_per_node": 4,
            "version": 0.1,
        },
        1,
        ElasticityConfigError,
        "elasticity.model_parallel_size: got 2, more than 1 needs version 0.2, and version is 0.1",
        "set elasticity.version to 0.2, or set elasticity.model_parallel_size to 1",
    ),
    (
        {"max_train_batch_size": 50, "micro_batch_sizes": [4], "model_parallel_size": 2, "version": 0.1},
        1,
        ElasticityConfigError,
        "elasticity.model_parallel_size: got 2, more than 1 needs version 0.2, and version is 0.1",
        "set elasticity.model_parallel_size to 1",
    ),
]


@pytest.mark.parametrize(("keys", "ranks", "error", "what", "fix"), ERRORS, ids=[case[3][:60] for case in ERRORS])
def test_an_error_names_the_users_own_numbers(
    keys: dict[str, Any], ranks: int, error: type[ElasticityError], what: str, fix: str
) -> None:
    with pytest.raises(ElasticityError) as caught:
        elastic_sizes(section(**keys), ranks)
    assert (type(caught.value), caught.value.what, caught.value.fix) == (error, what, fix)
    assert issubclass(error, ConfigError)


@pytest.mark.parametrize("keys", [case[0] for case in ERRORS if "got" in case[3]], ids=str)
def test_each_fix_of_a_contradiction_removes_it(keys: dict[str, Any]) -> None:
    (problem,) = check_elasticity(section(**keys))
    assert problem.keys == tuple(problem.path.split("."))
    for changed, _ in applied(problem.fix, section(**keys), 1):
        assert check_elasticity(changed) == []


def test_contradictions_of_a_section_that_is_off_are_nobodys_business() -> None:
    assert check_elasticity(ElasticitySection(min_gpus=9, max_gpus=2)) == []


def test_a_section_as_large_as_can_be_is_answered() -> None:
    # Every candidate has many divisors, and none is in the range: the longest way through.
    sizes = tuple(range(720720, 720820))
    largest = section(max_train_batch_size=2**31 - 1, micro_batch_sizes=sizes, min_gpus=2**60, max_gpus=10**30)
    with pytest.raises(ElasticityConfigError, match=f"any number of GPUs from {2**60} to {10**30}"):
        elastic_sizes(largest, 8)


OURS = {"max_train_batch_size": 100, "micro_batch_sizes": [4, 6], "version": 0.2}


def test_the_scheduler_may_say_the_same_or_nothing() -> None:
    ours = section(**OURS)
    assert check_scheduler(ours, {}) == []
    for said in (OURS, {}, {"version": 0.2}, {**OURS, "enabled": True, "min_gpus": 3, "cluster": "x"}):
        assert check_scheduler(ours, {"DEEPSPEED_ELASTICITY_CONFIG": json.dumps(said)}) == []


@pytest.mark.parametrize(
    ("key", "said", "text"),
    [
        ("max_train_batch_size", 200, "got 100, and DEEPSPEED_ELASTICITY_CONFIG says 200"),
        ("micro_batch_sizes", [6, 4], "got [4, 6], and DEEPSPEED_ELASTICITY_CONFIG says [6, 4]"),
        ("version", 0.1, "got 0.2, and DEEPSPEED_ELASTICITY_CONFIG says 0.1"),
    ],
)
def test_the_scheduler_and_the_configuration_must_agree(key: str, said: Any, text: str) -> None:
    environ = {"DEEPSPEED_ELASTICITY_CONFIG": json.dumps({**OURS, key: said})}
    (problem,) = check_scheduler(section(**OURS), environ)
    assert (problem.path, problem.text) == (f"elasticity.{key}", text)


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        ("{", "DEEPSPEED_ELASTICITY_CONFIG", 'got "{", which is not JSON'),
        ("[" * 50000, "DEEPSPEED_ELASTICITY_CONFIG", "which is not JSON"),
        ("[3]", "DEEPSPEED_ELASTICITY_CONFIG", "got [3], must be an object { ... }"),
        ('{"version": "new"}', "DEEPSPEED_ELASTICITY_CONFIG.version", 'got "new", must be a finite number'),
    ],
    ids=["torn", "deep", "list", "word"],
)
def test_what_the_scheduler_says_must_make_sense(text: str, path: str, said: str) -> None:
    (problem,) = check_scheduler(section(**OURS), {"DEEPSPEED_ELASTICITY_CONFIG": text})
    assert problem.path == path
    assert said in problem.text


def test_loading_takes_its_sizes_from_the_section() -> None:
    config = load_config({"elasticity": {"enabled": True, **OURS}}, dp_world_size=8)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (96, 6)
    assert config.gradient_accumulation_steps == 2


GIVEN = st.fixed_dictionaries({}, optional=dict.fromkeys(BATCH_KEYS, st.integers(1, 48)))


@anywhere
@given(GIVEN, SECTIONS, st.integers(1, 40), st.booleans(), st.booleans())
def test_loading_gives_sizes_that_fit_or_names_what_does_not(
    batch: dict[str, int], section: ElasticitySection, ranks: int, is_on: bool, ignores: bool
) -> None:
    keys = {**section.model_dump(), "enabled": is_on, "ignore_non_elastic_batch_info": ignores}
    given_keys = {**batch, "elasticity": keys}
    problems = {problem.path for problem in find_problems(given_keys, dp_world_size=ranks)}
    if problems:
        culprits = {"elasticity", "elasticity.max_train_batch_size", "elasticity.micro_batch_sizes"}
        beside = set(batch) if not ignores else set()
        assert problems <= culprits | beside if is_on else problems == {"train_batch_size"}
        assert problems >= beside or not is_on
        with pytest.raises(ConfigError):
            load_config(given_keys, dp_world_size=ranks)
        return
    config = load_config(given_keys, dp_world_size=ranks)
    train, micro, accumulation = (getattr(config, key) for key in BATCH_KEYS)
    assert train == micro * accumulation * ranks
    assert min(train, micro, accumulation) > 0
    if is_on:
        assert ignores or not batch
        plan = elastic_sizes(section, ranks)
        assert (train, micro, accumulation) == (plan.train, plan.micro, plan.accumulation)
    else:
        assert {key: getattr(config, key) for key in batch} == batch


def test_loading_lists_every_contradiction_and_every_key_beside() -> None:
    wrong = {**OURS, "enabled": True, "min_gpus": 9, "max_gpus": 2, "num_gpus_per_node": 3, "model_parallel_size": 2}
    problems = find_problems({"elasticity": wrong, "train_batch_size": 8}, dp_world_size=7)
    assert [problem.path for problem in problems] == [
        "elasticity.min_gpus",
        "elasticity.num_gpus_per_node",
        "train_batch_size",
    ]


def test_loading_does_not_ask_for_sizes_that_a_wrong_section_would_have_chosen() -> None:
    problems = find_problems({"elasticity": {"enabled": True, "micro_batch_sizes": [0]}}, dp_world_size=7)
    assert [problem.path for problem in problems] == [
        "elasticity.max_train_batch_size",
        "elasticity.micro_batch_sizes[0]",
    ]


def test_loading_asks_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSPEED_ELASTICITY_CONFIG", json.dumps({**OURS, "version": 0.1}))
    with pytest.raises(ConfigError, match=re.escape("elasticity.version: got 0.2, and DEEPSPEED_ELASTICITY_CONFIG")):
        load_config({"elasticity": {"enabled": True, **OURS}}, dp_world_size=8)
    load_config({"elasticity": OURS, "train_batch_size": 8}, dp_world_size=8)


def test_without_a_number_of_ranks_the_section_is_still_checked() -> None:
    too_small = {"enabled": True, "max_train_batch_size": 5, "micro_batch_sizes": [6]}
    assert [problem.path for problem in find_problems({"elasticity": too_small})] == ["elasticity.micro_batch_sizes"]
    assert find_problems({"elasticity": {"enabled": True, **OURS}}) == []
