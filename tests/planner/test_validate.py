"""Judging the estimate: known errors come out as they went in, and no row can break the others."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.errors import ConfigError
from colossus.planner.evidence.published import run_of
from colossus.planner.evidence.validate import (
    Comparison,
    compare,
    details,
    ranking,
    ranks,
    read_tables,
    regret,
    report,
    select,
    spearman,
    step_flops,
    timed,
)

LAYOUTS = ((1, 1, 1), (1, 2, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1), (4, 2, 2), (8, 1, 4))
"""tp, pp, micro_batch"""


def row(**changes: Any) -> dict[str, str]:
    """A small model on 16 H100, trained as by Megatron."""
    row = {
        "id": "a", "source": "lab", "url_or_path": "github:lab/table", "model_name": "gpt-small", "family": "llama",
        "n_layers": 16, "hidden": 2048, "n_heads": 16, "vocab": 32000, "seq_len": 4096, "gpu": "H100-SXM",
        "n_gpus": 16, "precision": "bf16", "tp": 1, "pp": 1, "micro_batch": 1, "global_batch_seqs": 128,
        "recompute": "none", "framework": "Megatron-Core", "tier": "A", "metric_step_time_s": 1.0,
    }  # fmt: skip
    return {name: str(value) for name, value in {**row, **changes}.items()}


def rows(**changes: Any) -> list[dict[str, str]]:
    """The same run in seven layouts."""
    return [
        row(id=f"layout-{i}", tp=tp, pp=pp, micro_batch=micro_batch, **changes)
        for i, (tp, pp, micro_batch) in enumerate(LAYOUTS)
    ]


def predicted(table: list[dict[str, str]]) -> list[float]:
    return [float(x) for x in compare(table).parts.total_s]


def with_times(table: list[dict[str, str]], times: list[float]) -> list[dict[str, str]]:
    return [{**row, "metric_step_time_s": repr(time)} for row, time in zip(table, times, strict=True)]


# --- errors ---


def test_an_error_of_ten_percent_is_reported_as_ten_percent() -> None:
    table = rows()
    judged = report(compare(with_times(table, [time / 1.1 for time in predicted(table)])))
    for name in ("mape", "median", "p90", "bias"):
        assert judged[name] == pytest.approx(10.0)
    assert judged["n"] == len(LAYOUTS)
    assert judged["by"]["gpu"]["H100-SXM"]["mape"] == pytest.approx(10.0)
    assert judged["by"]["scale"]["9-64"]["n"] == len(LAYOUTS)
    assert judged["ranking"]["spearman"] == pytest.approx(1.0)
    assert judged["ranking"]["regret_max"] == 0.0


def test_tokens_per_second_say_the_same_as_a_step_time() -> None:
    by_time, by_rate = row(metric_step_time_s=2.5), row(metric_step_time_s="")
    by_rate["metric_tokens_per_gpu_s"] = repr(128 * 4096 / 16 / 2.5)
    errors = compare([by_time, by_rate]).log_errors
    assert errors[0] == pytest.approx(errors[1])


def test_every_row_is_counted_once() -> None:
    table = [
        *rows(), row(id="oom", tier="OOM", metric_step_time_s=""), row(id="untimed", metric_step_time_s=""),
        row(id="unknown", gpu="Z9000"), row(id="uneven", tp=3),
    ]  # fmt: skip
    judged = report(compare(table))
    assert (
        judged["n"] + judged["oom"]["num_out_of_memory"] + judged["skipped"] == judged["rows"] == len(table)
    )
    reasons = {ident: reason for reason, those in judged["skipped_reasons"].items() for ident in those["ids"]}
    assert set(reasons) == {"untimed", "unknown", "uneven"}
    assert reasons["untimed"] == "no time published"
    assert "Z9000" in reasons["unknown"]
    assert "multiple" in reasons["uneven"]
    assert sum(those["count"] for those in judged["skipped_reasons"].values()) == judged["skipped"]


def test_intervals_are_counted_where_they_hold() -> None:
    table = rows()
    found = compare(table)
    just_inside = [float(x) * 1.0001 for x in found.low_s]
    outside = [float(x) * 1.0001 for x in found.high_s]
    assert report(compare(with_times(table, just_inside)))["interval_coverage"] == 100.0
    assert report(compare(with_times(table, outside)))["interval_coverage"] == 0.0


def test_verdicts() -> None:
    small, huge = row(), row(n_layers=96, hidden=12288, n_heads=96)
    table = [
        {**small, "id": "ran"}, {**huge, "id": "burst", "tier": "OOM", "metric_step_time_s": ""},
        {**small, "id": "missed", "tier": "OOM", "metric_step_time_s": ""}, {**huge, "id": "alarm"},
    ]  # fmt: skip
    verdicts = report(compare(table))["oom"]
    assert (verdicts["recall"], verdicts["precision"], verdicts["accuracy"]) == (50.0, 50.0, 50.0)
    assert (verdicts["missed"], verdicts["false_alarms"]) == (["missed"], ["alarm"])


def test_memory_errors() -> None:
    size = float(compare([row()]).memory_bytes[0]) / 2**30
    memory = report(compare([row(metric_memory_gib=size / 1.25), row()]))["memory"]
    assert memory["n"] == 1
    assert memory["bias"] == pytest.approx(25.0)


# --- ranking ---


def test_a_reversed_order_costs_what_the_worst_costs() -> None:
    table = rows()
    times = predicted(table)
    backwards = [max(times) + min(times) - time for time in times]
    (group,) = ranking(compare(with_times(table, backwards)))
    assert group.num_layouts == len(LAYOUTS)
    assert group.spearman == pytest.approx(-1.0)
    assert group.regret == pytest.approx(max(times) / min(times) - 1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"global_batch_seqs": "256"},
        {"precision": "fp8"},
        {"framework": "NeMo"},
        {"n_gpus": "32"},
        {"seq_len": "2048"},
        {"n_heads": "32"},
        {"source": 'lab, table "another round"'},
    ],
)
def test_rows_are_ranked_only_among_their_own(change: dict[str, str]) -> None:
    table = rows()
    other = [{**entry, **change} for entry in table]
    assert [group.num_layouts for group in ranking(compare(table + other))] == [len(LAYOUTS)] * 2
    recomputed = [{**entry, "recompute": "full"} for entry in table]  # of the layout
    assert [group.num_layouts for group in ranking(compare(table + recomputed))] == [2 * len(LAYOUTS)]


def test_a_trial_number_or_a_note_in_brackets_is_no_section() -> None:
    table = [
        {**entry, "source": f"lab all_runs.xlsx (tp={entry['tp']}) trial {i}"}
        for i, entry in enumerate(rows())
    ]
    assert [group.num_layouts for group in ranking(compare(table))] == [len(LAYOUTS)]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    file = tmp_path / "from_a_spreadsheet.csv"
    table = rows()
    lines = [",".join(table[0]), *(",".join(entry.values()) for entry in table)]
    file.write_text("\n".join(lines), encoding="utf-8-sig")
    assert [entry["id"] for entry in read_tables([file])] == [entry["id"] for entry in table]


def test_measuring_a_layout_again_does_not_make_it_two() -> None:
    table = rows()
    assert [group.num_layouts for group in ranking(compare(table + table))] == [len(LAYOUTS)]
    assert ranking(compare(table[:2])) == []


values = st.lists(st.integers(0, 5), min_size=2, max_size=8)


@given(values)
def test_ranks_count_those_below_and_half_of_those_alike(numbers: list[int]) -> None:
    array = np.array(numbers, dtype=float)
    expected = [sum(x < y for x in numbers) + (sum(x == y for x in numbers) + 1) / 2 for y in numbers]
    assert ranks(array).tolist() == expected


@given(values, st.randoms())
def test_spearman_without_ties_is_the_textbook_formula(numbers: list[int], random: Any) -> None:
    n = len(numbers)
    order = list(range(n))
    random.shuffle(order)
    difference = sum((i - place) ** 2 for i, place in enumerate(order))
    expected = 1 - 6 * difference / (n * (n * n - 1))
    assert spearman(np.arange(n, dtype=float), np.array(order, dtype=float)) == pytest.approx(expected)


def test_spearman_and_regret_with_ties() -> None:
    assert spearman(np.array([1.0, 2.0]), np.array([3.0, 3.0])) is None
    assert spearman(np.array([1.0, 1.0]), np.array([3.0, 4.0])) == 0.0
    assert regret(np.array([1.0, 1.0, 2.0]), np.array([10.0, 14.0, 9.0])) == pytest.approx(12 / 9 - 1)


# --- step time from FLOP/s ---

PUBLISHED = [
    # BigScience tr11-176B chronicles: full recompute counted ("8·N")
    (row(n_layers=84, hidden=13824, n_heads=64, family="gpt", vocab=250000, seq_len=2048, gpu="A100-80", tp=8, pp=12,
         n_gpus=384, global_batch_seqs=2048), "HARDWARE TFLOPs (8*N coefficient incl. full recompute)", 131.27, 133.12),
    # arXiv:2201.11990 section 4.2, MT-NLG 530B
    (row(n_layers=105, hidden=20480, n_heads=128, family="gpt", vocab=50272, seq_len=2048, gpu="A100-80", tp=8, pp=35,
         n_gpus=2240, global_batch_seqs=1920), "HARDWARE-type (Megatron formula incl. recompute)", 126, 60.1),
    # InternLM/InternEvo benchmark, 7B, vocabulary 103,168
    (row(n_layers=32, hidden=4096, n_heads=32, vocab=103168, seq_len=2048, gpu="A100-80", n_gpus=64,
         global_batch_seqs=512), "Megatron SC21 formula: without recompute", 174, 4.1542),
    (row(n_layers=32, hidden=4096, n_heads=32, vocab=103168, seq_len=2048, gpu="A100-80", n_gpus=64,
         global_batch_seqs=512), "Megatron SC21 formula: HARDWARE-type (incl. recompute)", 188, 5.0929),
    # mosaicml/llm-foundry scripts/train/benchmarking, MPT-70B on 512 H100
    (row(n_layers=80, hidden=8192, n_heads=64, family="gpt", vocab=50368, seq_len=2048, n_gpus=512,
         global_batch_seqs=4096), "model FLOPs; 6N + full (non-causal) attention 12*L*d*s", 408, 16.2685),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "convention", "tflops", "step_s"), PUBLISHED)
def test_flops_and_times_that_were_published_together_agree(
    entry: dict[str, str], convention: str, tflops: float, step_s: float
) -> None:
    untimed = {
        **entry,
        "metric_step_time_s": "",
        "metric_tflops_per_gpu": str(tflops),
        "flops_convention": convention,
    }
    assert timed(run_of(untimed)).step_s == pytest.approx(step_s, rel=0.01)
    measured = {**untimed, "metric_step_time_s": "7.0"}
    assert timed(run_of(measured)).step_s == 7.0  # a time that was published stays


def test_conventions_differ_as_their_formulas_do() -> None:
    model = run_of(row(family="gpt")).model
    hardware = step_flops(
        "HARDWARE-type: 96*B*s*l*h^2*(1+s/6h+V/16lh) includes full recompute", model, 8, 2048
    )
    plain = step_flops("model FLOPs 72BLsh^2(1+s/6h+V/12hL): FULL attention", model, 8, 2048)
    causal = step_flops("model FLOPs 6N*tok + 6*s^2*d*h*L: CAUSAL (halved) attention", model, 8, 2048)
    whole = step_flops("6N + 12*L*h*s", model, 8, 2048)
    assert hardware
    assert plain
    assert causal
    assert whole
    head = 6.0 * 8 * 2048 * model.vocab_size * model.hidden_size
    assert hardware - head == pytest.approx(
        (plain - head) * 4 / 3
    )  # one more forward pass, of the layers alone
    assert whole - causal == 6.0 * 8 * 2048**2 * model.num_layers * model.hidden_size


@pytest.mark.parametrize("text", ["", "none published", "TFLOPS/GPU, convention not stated", "model FLOPs"])
def test_an_unknown_convention_is_no_time(text: str) -> None:
    entry = row(metric_step_time_s="", metric_tflops_per_gpu=400, flops_convention=text)
    assert math.isnan(timed(run_of(entry)).step_s)
    assert report(compare([entry]))["skipped_reasons"]["no time published"]["ids"] == ["a"]


# --- row by row ---


def test_details_keep_order_and_parts_add_up() -> None:
    table = [row(id="first"), row(id="bad", n_gpus="many"), row(id="oom", tier="OOM", metric_step_time_s="")]
    listed = details(compare(table))
    assert [entry["id"] for entry in listed] == ["first", "bad", "oom"]
    parts = [name for name in listed[0] if name.endswith("_s")]
    parts = [name for name in parts if name not in ("measured_s", "predicted_s", "low_s", "high_s")]
    assert sum(listed[0][name] for name in parts) == pytest.approx(listed[0]["predicted_s"])
    assert listed[0]["low_s"] < listed[0]["predicted_s"] < listed[0]["high_s"]
    assert "many" in listed[1]["skipped"]
    assert (listed[2]["measured_s"], listed[2]["published_verdict"]) == ("", "out of memory")


# --- selection ---


def test_conditions_all_hold_and_values_are_alternatives() -> None:
    table = [row(id="a", gpu="H200"), row(id="b"), row(id="c", gpu="A100-80"), row(id="d", tier="B")]
    chosen = select(table, ["gpu=H100-SXM|h200,tier=A"])
    assert [entry["id"] for entry in chosen] == ["a", "b"]
    assert select(table, ["gpu=H100-SXM|h200", "tier=A"]) == chosen


@pytest.mark.parametrize(
    ("condition", "part"),
    [
        ("gpus=H200", "Did you mean 'gpu'"),
        ("gpu=TPU", "H100-SXM"),
        ("H200", "COLUMN=VALUE"),
        ("", "COLUMN=VALUE"),
    ],
)
def test_conditions_that_cannot_hold(condition: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace("(", "\\(")):
        select([row()], [condition])


# --- hostile input ---


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\x01\xff\xfe", b"id,gpu\na,b\n", b'"', (",".join(row()) + "\n").encode()],
    ids=["empty", "binary", "columns", "quote", "header"],
)
def test_files_that_are_no_tables(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"table\.csv"):
        compare(read_tables([path]))


BAD = [
    ("n_gpus", "0"), ("n_gpus", "-8"), ("n_gpus", "nan"), ("n_gpus", "1e400"), ("tp", "two"), ("tp", "1.5"),
    ("hidden", "0"), ("n_layers", "inf"), ("gpu", ""), ("precision", "bf17"), ("seq_len", ""), ("n_heads", "x"),
    ("metric_step_time_s", "soon"), ("metric_step_time_s", "-1"), ("framework", "DeepSpeed CPU offload"),
    ("n_layers", "1e300"), ("hidden", "1e200"), ("global_batch_seqs", "1e308"),
    ("metric_step_time_s", "1e-300"), ("metric_step_time_s", "1e9"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "text"), BAD)
def test_a_bad_row_costs_itself_alone(column: str, text: str) -> None:
    good = rows()
    found = compare([*good, row(id="bad", **{column: text})])
    assert set(found.skipped) == {len(good)}
    assert 0 < len(found.skipped[len(good)]) <= 160
    assert report(found)["n"] == len(good)
    assert [float(x) for x in found.parts.total_s[: len(good)]] == predicted(good)


def test_counts_as_spreadsheets_write_them() -> None:
    assert predicted([row(n_gpus="16.0", tp="2.0"), row(n_gpus="1.6e1", tp="2")]) == predicted(
        [row(tp=2)] * 2
    )


def test_nothing_but_bad_rows() -> None:
    with pytest.raises(ConfigError, match=r"none of the 2 rows .* n_gpus"):
        compare([row(n_gpus="x"), row(n_gpus="x")])


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(row())),
        st.one_of(st.text(max_size=12), st.floats().map(repr), st.integers(-(10**30), 10**30).map(str)),
        max_size=4,
    )
)
def test_whatever_a_row_holds(changes: dict[str, str]) -> None:
    found: Comparison = compare([row(id="good"), row(**changes)])
    judged = report(found)
    assert judged["n"] + judged["skipped"] + judged["oom"]["num_out_of_memory"] >= judged["rows"] == 2
    assert len(details(found)) == 2


@pytest.mark.parametrize(
    ("published", "known"),
    [
        ("Llama-3.1-405B-proxy-7L", "llama3.1-405b"),
        ("Grok-1-314B-proxy-2L", "grok-1"),
        ("DeepSeek-V3-671B (dropless)", "deepseek-v3"),
        ("Qwen3-235B", "qwen3-235b-a22b"),
        ("Llama-2-70B-LoRA", "llama2-70b"),
        ("Nemotron-4-340B", "nemotron4-340b"),
        ("LLaMA-13B", None),
        ("GPT-181B (BLOOM search)", None),
    ],
)
def test_names_as_papers_write_them(published: str, known: str | None) -> None:
    from colossus.planner.evidence.published import zoo_name

    assert zoo_name(published) == known
