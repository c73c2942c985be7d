"""The `gpu` backend without a GPU: kernels in Triton's interpreter, code for real GPUs, and what a pass launches.

What this cannot show: the order in which tensor cores add, races between programs, recordings on CUDA, speed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from cascadeexit import backends
from cascadeexit.backends.gpu import GpuBackend, fits_shape
from cascadeexit.backends.weights import DecoderShape
from tests.tiny_models import tiny_base

triton = pytest.importorskip("triton", reason="Triton comes for Linux on x86-64 only")

ROOT = Path(__file__).parents[1]
PARTS = sorted((ROOT / "tests/interpreted").glob("test_*.py"))
CAPABILITIES = (80, 86, 89, 90, 100, 120)
LLAMA_3B = LlamaConfig(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=2,
                       num_attention_heads=24, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192)
SHAPES = {
    "llama-3b": (LLAMA_3B, torch.bfloat16),
    "smollm2-135m": (LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=2,
                                 num_attention_heads=9, num_key_value_heads=3), torch.bfloat16),
    "qwen2-0.5b": (Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=2,
                               num_attention_heads=14, num_key_value_heads=2), torch.float16),
    "qwen3-4b": (Qwen3Config(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=2,
                             num_attention_heads=32, num_key_value_heads=8, head_dim=128), torch.bfloat16),
    "heads of 80": (LlamaConfig(vocab_size=32000, hidden_size=2560, intermediate_size=6912, num_hidden_layers=2,
                                num_attention_heads=32, num_key_value_heads=32), torch.bfloat16),
    "heads of 96": (LlamaConfig(vocab_size=32000, hidden_size=3072, intermediate_size=8192, num_hidden_layers=2,
                                num_attention_heads=32, num_key_value_heads=8), torch.float16),
}
MULTIPLYING = ("qkv_heads", "attend", "linear", "gated", "head_logits")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
            torch.int64: "*i64"}


class OnMeta(GpuBackend):
    """The `gpu` backend over shapes without numbers: it launches nothing, and says what it would launch."""

    fits = staticmethod(fits_shape)


def launched(shape: str, rows: int = 1, context: int = 0) -> list[tuple]:
    """Launches of one pass of so many rows after a context: through all layers, norm, head and argmax."""
    from cascadeexit.backends.gpu import launches

    config, dtype = SHAPES[shape]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base.model.rotary_emb = type(base.model.rotary_emb)(config)
    backend, found = OnMeta(base, (0, 2)), []
    cache = backend.layers.new_cache(context + rows)
    cache.advance(range(2), context)
    heard = launches._listeners
    heard.append(lambda *launch: found.append(launch))
    try:
        hidden = torch.empty(1, rows, config.hidden_size, dtype=dtype, device="meta")
        top, = backend.layers.run(range(1), hidden, cache)
        backend.head.launch(backend.layers.norm(top)[0])
    finally:
        heard.pop()
    return found


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.stem)
def test_kernels_in_the_interpreter(part, chosen):
    """In a process of its own: Triton reads TRITON_INTERPRET when a kernel is defined."""
    # One thread each: numpy's threads would wait for each other.
    environment = os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-m", chosen, str(part)], cwd=ROOT,
                         env=environment, capture_output=True, text=True)
    nothing_chosen = 5
    assert run.returncode in (0, nothing_chosen if chosen == "slow" else 0), run.stdout[-4000:] + run.stderr[-1000:]


# -- code for real GPUs -----------------------------------------------------------------------------------------------

def built(launch: tuple, capability: int):
    """Compile the kernel of a launch as CUDA would be given it, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cascadeexit.backends.gpu import kernels

    name, _, args, options = launch
    kernel = getattr(kernels, name)
    signature, constants, facts = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.arg_names, args)):
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            facts[i,] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            signature[parameter] = POINTERS[value.dtype]
        elif value is None or (type(value) is int and value == 1):
            signature[parameter], constants[parameter] = "constexpr", value
        else:
            signature[parameter] = "fp32" if isinstance(value, float) else "i32"
    for parameter in kernel.arg_names[len(args):]:
        signature[parameter], constants[parameter] = "constexpr", options[parameter]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=facts)
    sizes = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=sizes | {"enable_fp_fusion": True})


def resources(code, capability: int, folder: Path) -> tuple[int, int, int]:
    """Registers of a thread, and bytes that it spills: stores and loads."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", code.asm["ptx"])[1]
    (folder / "kernel.ptx").write_text(code.asm["ptx"])
    run = subprocess.run([get_ptxas(capability).path, "-v", f"--gpu-name={target}", folder / "kernel.ptx",
                          "-o", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    return int(re.search(r"Used (\d+) registers", run.stderr)[1]), int(spills[1]), int(spills[2])


@pytest.mark.parametrize("shape", [
    pytest.param(shape, marks=[] if shape in ("llama-3b", "smollm2-135m") else pytest.mark.slow) for shape in SHAPES])
def test_every_gpu_gets_code_without_spills(shape, tmp_path):
    """No kernel spills registers, and the shared memory of a block fits the smallest of these GPUs, 99 KB."""
    seen = {}
    for launch in launched(shape, 1, 300):
        name, _, args, options = launch
        seen[name, str([type(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]), str(options)] = launch
    assert len({name for name, *_ in seen}) == 8
    for (name, *_), launch in seen.items():
        for capability in CAPABILITIES:
            code = built(launch, capability)
            registers, stores, loads = resources(code, capability, tmp_path)
            print(f"{shape} {name} sm_{capability}: {registers} registers, {stores + loads} bytes spilled, "
                  f"{code.metadata.shared:,} bytes of shared memory")
            assert stores == loads == 0, f"{name} spills on sm_{capability}"
            assert code.metadata.shared <= 99 * 1024
            assert ("mma.sync" in code.asm["ptx"]) == (name in MULTIPLYING)
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+)", code.asm["ptx"])
            assert bool(copies) == (name in MULTIPLYING) and set(copies) <= {"0x10"}, "weights come in 16 bytes"


# -- budgets ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, context", [(1, 0), (1, 1000), (16, 1000)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_is_six_kernels(shape, rows, context):
    names = [name for name, *_ in launched(shape, rows, context)]
    layer = ["qkv_heads", "attend", "combine", "linear", "gated", "linear"]
    assert names == [*layer, *layer, "rms_norm", "head_logits", "argmax"]


def test_enough_programs_keep_a_gpu_busy():
    """At 3B shape, where bytes are read: 132 processors of an H100 share the weights."""
    for name, grid, *_ in launched("llama-3b", 1, 1000):
        programs = torch.Size(grid).numel()
        print(name, grid, programs)
        assert programs >= {"qkv_heads": 40, "attend": 64, "combine": 24, "rms_norm": 1, "argmax": 1}.get(name, 128)


# -- which models it takes --------------------------------------------------------------------------------------------

def test_a_cpu_is_not_for_this_backend():
    assert list(backends.BACKENDS) == ["cpu", "gpu", "torch"]
    assert not GpuBackend.fits(tiny_base(dtype=torch.bfloat16))
    assert fits_shape(tiny_base(dtype=torch.bfloat16)) and not fits_shape(tiny_base(dtype=torch.float32))


@pytest.mark.parametrize("capability, cuda, fits", [((7, 5), "12.8", False), ((8, 0), "12.8", True),
                                                    ((12, 0), "13.0", True), ((9, 0), None, False)])
def test_it_takes_bf16_models_on_gpus_that_multiply_bf16(monkeypatch, capability, cuda, fits):
    """Not on a T4 (7.5), nor on AMD's GPUs, which PyTorch calls CUDA as well."""
    base = tiny_base(dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)

    class OnCuda:
        model, config = base.model, base.config

        class lm_head:
            bias = None

            class weight:
                device, dtype = torch.device("cuda"), torch.bfloat16

    assert GpuBackend.fits(OnCuda) == fits
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not GpuBackend.fits(OnCuda), "no Triton"


def test_shapes_that_kernels_do_not_know_are_left_to_torch(monkeypatch):
    base = tiny_base(dtype=torch.bfloat16)
    shape = DecoderShape.of(base.config)
    monkeypatch.setattr("cascadeexit.backends.gpu.DecoderShape.of",
                        lambda config: DecoderShape(**vars(shape) | dict(head_dim=256)))
    assert not fits_shape(base)
