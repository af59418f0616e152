"""What is said of the costs of a step, from seconds that are given: batches, drafts, fusion and slow quantizations."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from edge_dlf.evidence import costs
from edge_dlf.families.files import FamilyFiles, check_files
from edge_dlf.families.spec import FamilySpec

from .tiny import tiny_lora, tiny_model


@pytest.fixture
def files(tmp_path: Path) -> FamilyFiles:
    large, base = tiny_model(tmp_path / "large.gguf"), tiny_model(tmp_path / "base.gguf")
    return check_files(FamilySpec.from_files(large, base, {"maths": tiny_lora(tmp_path / "lora.gguf")}))


NEARLY_FREE = {"large": (0.040, 0.041, 0.042), "base": (0.010, 0.010, 0.011), "maths": (0.010, 0.010, 0.011)}
TWICE = {name: (one, 2 * one, 4 * one) for name, (one, *_) in NEARLY_FREE.items()}


def test_batches_and_fusion_in_steps_of_one_token(files: FamilyFiles) -> None:
    assert costs.batches(TWICE).endswith("large 2.0 and 4.0, base 2.0 and 4.0, maths 2.0 and 4.0")
    assert costs.fusion(files, TWICE) == "a plain step takes 1.50 times one of the large model alone"


def test_drafting_pays_where_batches_are_nearly_free(files: FamilyFiles) -> None:
    # Three guesses, each right by 0.9, give 1 + 0.9 + 0.81 + 0.729 tokens. The drafter evaluates 3 + 0.729 of 10 ms.
    gain = 3.439 * 0.060 / (0.042 + 0.011 + 0.03729)
    assert f"pays here: with 90% of drafted tokens right, drafts of 3 tokens give {gain:.2f}" in costs.drafting(
        files, NEARLY_FREE
    )


def test_drafting_does_not_pay_where_a_batch_costs_as_much_as_its_tokens(files: FamilyFiles) -> None:
    # One guess gives 1.9 tokens for two steps of large and base and 1.9 of the drafter.
    gain = 1.9 * 0.060 / (0.080 + 0.020 + 0.019)
    assert costs.drafting(files, TWICE).startswith("does not pay here")
    assert f"{gain:.2f} times plain fusion at best" in costs.drafting(files, TWICE)


def test_a_corrector_cannot_draft(tmp_path: Path) -> None:
    large, base = tiny_model(tmp_path / "large.gguf"), tiny_model(tmp_path / "base.gguf")
    spec = FamilySpec.from_files(large, base, {"maths": tiny_lora(tmp_path / "lora.gguf")}, ["maths"])
    assert costs.drafting(check_files(spec), NEARLY_FREE).startswith("a corrector cannot draft")


@pytest.mark.parametrize(
    ("dtype", "file_type", "is_told"),
    [
        (GGMLQuantizationType.Q5_0, 15, True),
        (GGMLQuantizationType.Q5_0, 8, False),  # asked for as such
        (GGMLQuantizationType.Q8_0, 15, False),  # not slow
    ],
)
def test_rows_that_do_not_fit_the_type_that_was_asked_for(
    tmp_path: Path, dtype: GGMLQuantizationType, file_type: int, is_told: bool
) -> None:
    large = tiny_model(tmp_path / "large.gguf")
    base = tiny_model(tmp_path / "base.gguf", dtype=dtype, file_type=file_type)
    found = costs.slow_types(check_files(FamilySpec.from_files(large, base, {"maths": base})))
    assert len(found) == is_told
    if is_told:
        ((text, step),) = found
        assert text.startswith("base.gguf: ")
        assert "matrices are Q5_0, which is slow on CPUs, since rows of 32 do not fit Q4_K_M" in text
        assert step.endswith("llama-quantize ORIGINAL-F16.gguf base-q4_0.gguf Q4_0")
