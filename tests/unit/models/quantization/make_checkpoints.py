"""Writes the checkpoints of this folder with the libraries that users write theirs with. Not run by tests.

pip install llmcompressor==0.14.* compressed-tensors==0.20.* auto-round==0.16.*; then python make_checkpoints.py.
Each is one layer of Llama from a seed. Beside each lies what its library makes of its weights: `expected.json` has
the SHA-256 of every weight that the library dequantised itself, in the library's own type.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent / "checkpoints"
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
PACKED = {"W4A16": (4, True), "W4A16_ASYM": (4, False), "W3A16": (3, True)}
"""Bits and symmetry, in groups of 32 inputs."""
COMPRESSED = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK", "W8A8", *PACKED)
ROUNDED = {
    "auto_gptq_sym": ("auto_gptq", {"bits": 4, "sym": True}),
    "auto_gptq_asym": ("auto_gptq", {"bits": 4, "sym": False}),
    "auto_awq_asym": ("auto_awq", {"bits": 4, "sym": False}),
    "auto_round_sym": ("auto_round", {"bits": 4, "sym": True}),
    "auto_round_asym": ("auto_round", {"bits": 4, "sym": False}),
    "auto_round_3_bits": ("auto_round", {"bits": 3, "sym": True}),
    "auto_round_8_bits": ("auto_round", {"bits": 8, "sym": True}),
}


def make_model(folder):
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1)
    model.save_pretrained(folder)


def make_tokenizer():
    import tokenizers

    words = {f"w{index}": index for index in range(SHAPE["vocab_size"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w0", eos_token="w1")


def modules_of(tensors, marker):
    return sorted(name.removesuffix(marker) for name in tensors if name.endswith(marker))


def compress(plain, scheme, out):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    if scheme in PACKED:
        bits, symmetric = PACKED[scheme]
        weights = QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=32, symmetric=symmetric)
        asked = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
    else:
        asked = {"targets": "Linear", "scheme": scheme}
    static = {"dataset": calibration(), "num_calibration_samples": 4, "processor": make_tokenizer()}
    oneshot(
        model=model, recipe=[QuantizationModifier(ignore=["lm_head"], **asked)], **(static if scheme == "FP8" else {})
    )
    model.save_pretrained(out, save_compressed=True)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    args = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(args.format or config["format"])
    tensors = load_file(out / "model.safetensors")
    expected = {}
    for module in modules_of(tensors, ".weight_scale"):
        parts = {n.removeprefix(module + "."): t for n, t in tensors.items() if n.startswith(module + ".")}
        expected[module] = compressor.decompress(parts, args)["weight"]
    return expected


def calibration():
    import datasets

    ids = torch.randint(0, SHAPE["vocab_size"], (4, 32), generator=torch.Generator().manual_seed(1)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 32] * 4})


def round_weights(plain, form, options, out):
    from auto_round import AutoRound

    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    rounding = AutoRound(
        model, make_tokenizer(), group_size=32, iters=0, disable_opt_rtn=True, device_map="cpu", **options
    )
    rounding.quantize_and_save(str(out), format=form)
    found = sorted(out.rglob("config.json"))
    if found[0].parent != out:
        for path in found[0].parent.iterdir():
            shutil.move(path, out / path.name)
    tensors = load_file(out / "model.safetensors")
    expected = {}
    for module in modules_of(tensors, ".qweight"):
        parts = {n.removeprefix(module + "."): t for n, t in tensors.items() if n.startswith(module + ".")}
        expected[module] = unrounded(parts, options["bits"])
    return expected


def unrounded(parts, bits):
    """float16 [N, K], by auto-round's own layers; they tell AWQ's packing from GPTQ's by the shape here."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    groups, outputs = parts["scales"].shape
    inputs = groups * 32
    if parts["qweight"].shape[0] == inputs:
        return dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], bits, 32).T
    layer = QuantLinear(bits, 32, inputs, outputs, False)
    layer.qweight, layer.qzeros, layer.scales = parts["qweight"], parts["qzeros"], parts["scales"]
    return layer.eval()(torch.eye(inputs, dtype=torch.float16)).T


def main(names):
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain"
        make_model(plain)
        for name in (*COMPRESSED, *ROUNDED):
            if names and name not in names:
                continue
            out = Path(temporary) / name
            if name in COMPRESSED:
                expected = compress(plain, name, out)
            else:
                expected = round_weights(plain, *ROUNDED[name], out)
            kept = HERE / name.lower()
            kept.mkdir(parents=True, exist_ok=True)
            for path in out.iterdir():
                if path.name in ("config.json", "model.safetensors"):
                    shutil.copy(path, kept / path.name)
            digests = {
                module: hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                for module, weight in expected.items()
            }
            if digests:
                (kept / "expected.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
