"""Which formats of weights are read, passed through and written: a row each, and what shows it."""

from dataclasses import dataclass
from pathlib import Path

from tests.support.checkpoints import ROOT


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        name: of it.
        read: the test that compares what is read, as ``file: name``; empty where it is not read.
        oracle: in words, what that test compares with.
        carried: the test that it passes through where no expert changes it.
        written: the test that it is written.
        files: what makes a folder of it, for one that is refused.
        refused: words of the refusal: what to do instead.
    """

    name: str
    read: str = ""
    oracle: str = ""
    carried: str = ""
    written: str = ""
    files: tuple[str, ...] = ()
    refused: str = ""


_GROUPED, _DISTRIBUTED = "sources/test_grouped.py", "sources/test_distributed.py"
_QUANTISED = "sources/test_quantised.py"
_UNDER_ADAPTERS = "planning/test_packed.py: test_packed_tensors_that_no_adapter_changes_are_carried"
_SAVED = "sources/test_format.py: test_written_bytes_equal_those_of_save_file"
_CODES = f"{_GROUPED}: test_compressed_tensors_codes_have_its_bits"
FORMATS = (
    Format("safetensors: BF16, F16, F32, F64",
           _SAVED, "the safetensors library", written=_SAVED),
    Format("FP8: blocks, channels, tensors",
           f"{_QUANTISED}: test_blocks_have_the_bits_that_transformers_gives",
           "transformers' own quantiser, both ways", _UNDER_ADAPTERS,
           "run/test_fp8_output.py: test_codes_and_scales_are_those_of_transformers"),
    Format("MXFP4 of gpt-oss", f"{_QUANTISED}: test_mxfp4_has_the_bits_that_transformers_gives",
           "transformers' own dequantisation"),
    Format("INT4, INT8, NVFP4, MXFP4, MXFP8 of compressed-tensors", _CODES, "compressed-tensors",
           _UNDER_ADAPTERS),
    Format("AWQ", f"{_GROUPED}: test_awq_codes_have_the_bits_of_their_converter",
           "compressed-tensors' converter", _UNDER_ADAPTERS),
    Format("GPTQ", f"{_GROUPED}: test_gptq_codes_follow_the_formula", "its formula, written out",
           _UNDER_ADAPTERS),
    Format("NF4, FP4 of bitsandbytes", f"{_GROUPED}: test_bitsandbytes_codes_have_its_bits",
           "bitsandbytes on the CPU", _UNDER_ADAPTERS),
    Format("8 bits of bitsandbytes, MLX, torchao, quanto, HQQ, AQLM", carried=_UNDER_ADAPTERS,
           refused="Give the original checkpoint"),
    Format("torch's distributed checkpoints (FSDP of accelerate, TRL, torchtune)",
           f"{_DISTRIBUTED}: test_a_distributed_checkpoint_is_what_torchs_converter_makes_of_it",
           "`dcp_to_torch_save`, saved by two and four processes"),
    Format("shards of verl's FSDP workers",
           f"{_DISTRIBUTED}: test_verls_shards_are_what_its_merger_makes_of_them",
           "the arithmetic of verl's `model_merger`, saved by two and four processes"),
    Format("DeepSpeed: universal checkpoints, states of ZeRO 1 and 2, gathered 16-bit weights",
           f"{_DISTRIBUTED}: test_deepspeeds_weights_are_read",
           "what was saved under DeepSpeed's keys"),
    Format("DeepSpeed: ZeRO 3, several model-parallel ranks",
           files=("zero_to_fp32.py", "global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt"),
           refused="zero_to_fp32.py"),
    Format("GGUF: all types of the package gguf; Llama, Qwen2, Qwen3 and what is built as they are",
           "sources/test_ggml.py: test_a_gguf_file_has_the_values_that_transformers_reads",
           "transformers' own reading of files that llama.cpp's package writes"),
    Format("pickles: pytorch_model.bin", files=("config.json", "pytorch_model.bin"),
           refused="save_pretrained"),
    Format("Mistral's consolidated.safetensors", files=("consolidated.safetensors", "params.json"),
           refused="convert_mistral_weights_to_hf"),
    Format("any of these in a bucket of the Hub (`hf://buckets/…`)",
           "sources/test_buckets.py: "
           "test_an_average_of_a_buckets_checkpoints_has_the_bytes_of_the_folders",
           "the same files in a folder"),
)  # fmt: skip


def table() -> str:
    """Return the formats as they stand in ``docs/models.md``."""
    rows = []
    for one in FORMATS:
        kept = "yes" if one.carried else ""
        cells = [one.name, "yes" if one.read else "", kept, "yes" if one.written else ""]
        rows.append(f"| {' | '.join([*cells, one.refused or one.oracle])} |\n")
    return (
        "| format | read | passes through | written | equal to; or what the refusal names |\n"
        "|---|---|---|---|---|\n" + "".join(rows)
    )


def place_of(place: str) -> tuple[Path, str]:
    """Return file and name of a test that a row names."""
    file, _, name = place.partition(": ")
    return ROOT / "tests" / file, name
