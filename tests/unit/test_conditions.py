"""The facts that decide bits: cheap and quiet to read whatever a script has switched, and compared in plain words."""

import io
import json
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcckpt.state import conditions as module
from hpcckpt.state.conditions import conditions, differences, doubts

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
VALUES = st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False)
FACTS = st.dictionaries(st.sampled_from([*module._FACTS]), VALUES, min_size=1)


@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("meta"), torch.device("mps")])
def test_the_facts_are_plain_and_go_through_a_file(device):
    facts = conditions(device)
    assert {type(value) for value in facts.values()} <= {str, int, float, bool}
    assert facts["device"] == device.type
    file = io.BytesIO()
    torch.save(facts, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == json.loads(json.dumps(facts)) == facts


def test_the_facts_of_a_cpu_are_there():
    facts = conditions(CPU)
    assert facts["torch"] == str(torch.__version__)
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert facts["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    expected = "machine deterministic matmul_precision conv_precision rnn_precision onednn_enabled onednn_deterministic"
    assert set(expected.split()) <= facts.keys()


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="a later torch tells the name of the CPU")
def test_the_name_of_the_cpu_is_there():
    assert conditions(CPU)["cpu"] == torch.cpu.get_capabilities()["cpu_name"]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="a build with MKL")
def test_the_version_of_mkl_is_there():
    assert "Math Kernel Library Version 20" in conditions(CPU)["mkl"]


def test_the_switches_of_cuda_can_be_read_without_a_gpu():
    expected = "matmul_precision conv_precision rnn_precision fp16_reduction bf16_reduction fp16_accumulation attention cudnn_enabled"
    assert {*expected.split(), "cudnn_deterministic", "cudnn_benchmark"} <= conditions(CUDA).keys()
    assert "threads" not in conditions(CUDA)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_every_fact_has_a_name_in_sentences(device):
    assert conditions(device).keys() <= module._FACTS.keys()


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_nothing_differs_from_itself(device):
    assert differences(conditions(device), conditions(device)) == []


def test_numpy_counts_only_where_it_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", type(sys)("numpy"))
    sys.modules["numpy"].__version__ = "9.9.9"
    assert conditions(CPU)["numpy"] == "9.9.9"
    monkeypatch.delitem(sys.modules, "numpy")
    assert "numpy" not in conditions(CPU)


def test_the_gpu_counts_only_once_cuda_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert "gpu" not in conditions(CUDA)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert conditions(CUDA)["gpu"] == "GPU 0"
    assert "gpu" not in conditions(CPU)


def test_facts_that_cannot_be_read_are_left_out(monkeypatch):
    def failing(*_):
        raise RuntimeError("driver")

    monkeypatch.setattr(torch, "get_deterministic_debug_mode", failing)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", failing)
    facts = conditions(CUDA)
    assert "deterministic" not in facts
    assert "gpu" not in facts
    assert facts["device"] == "cuda"


# Each in a process of its own: torch does not let go of its switches for TF32 once they are set.
SWITCHES = {
    "matmul-new": ("cuda", "torch.backends.cuda.matmul.fp32_precision = 'tf32'", "matmul_precision", "tf32"),
    "matmul-old": ("cuda", "torch.backends.cuda.matmul.allow_tf32 = True", "matmul_precision", "tf32"),
    "matmul-old-name": ("cuda", "torch.set_float32_matmul_precision('high')", "matmul_precision", "tf32"),
    "conv-new": ("cuda", "torch.backends.cudnn.conv.fp32_precision = 'ieee'", "conv_precision", "ieee"),
    "conv-old": ("cuda", "torch.backends.cudnn.allow_tf32 = False", "rnn_precision", "ieee"),
    "all-new": ("cuda", "torch.backends.fp32_precision = 'tf32'", "matmul_precision", "tf32"),
    "matmul-on-cpu": ("cpu", "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", "matmul_precision", "bf16"),
    "mixed": (
        "cuda",
        "torch.backends.cuda.matmul.allow_tf32 = False; torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "matmul_precision",
        "tf32",
    ),
    "deterministic": ("cpu", "torch.use_deterministic_algorithms(True)", "deterministic", "on"),
    "deterministic-warn": ("cpu", "torch.use_deterministic_algorithms(True, warn_only=True)", "deterministic", "warn only"),
    "threads": ("cpu", "torch.set_num_threads(torch.get_num_threads() + 1)", "threads", None),
    "benchmark": ("cuda", "torch.backends.cudnn.benchmark = True", "cudnn_benchmark", True),
    "cudnn-deterministic": ("cuda", "torch.backends.cudnn.deterministic = True", "cudnn_deterministic", True),
    "reduction": ("cuda", "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False", "bf16_reduction", False),
    "attention": ("cuda", "torch.backends.cuda.enable_flash_sdp(False)", "attention", "memory-efficient, math, cuDNN"),
    "onednn": ("cpu", "torch.backends.mkldnn.enabled = False", "onednn_enabled", False),
    "environment": ("cpu", "import os; os.environ['MKL_CBWR'] = 'COMPATIBLE'", "MKL_CBWR", "COMPATIBLE"),
    "nccl": ("cuda", "import os; os.environ['NCCL_ALGO'] = 'Ring'", "NCCL_ALGO", "Ring"),
}


PROGRAM = """
import json, os, sys, traceback
import torch
from hpcckpt.state.conditions import conditions, differences

for name, (kind, switch, *_) in json.load(sys.stdin).items():
    child = os.fork()
    if child == 0:
        try:
            device = torch.device(kind)
            before = conditions(device)
            exec(switch)
            after = conditions(device)
            print(json.dumps([name, before, after, differences(before, after), torch.cuda.is_initialized()]), flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def switched():
    """Return what each switch has changed, and all that was said on stderr."""
    command = [sys.executable, "-W", "always", "-c", PROGRAM]
    run = subprocess.run(command, input=json.dumps(SWITCHES), capture_output=True, text=True, timeout=120, check=True)
    return {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}, run.stderr


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_shows(name, switched):
    _, _, fact, value = SWITCHES[name]
    before, after, told, cuda_runs = switched[0][name]
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key] != after[key]}
    assert fact in changed
    assert value in {None, after[fact]}
    assert len(told) == len(changed)
    assert not cuda_runs


def test_reading_warns_of_nothing_whatever_was_switched(switched):
    # Setting an old switch may warn.
    assert switched[0].keys() == SWITCHES.keys()
    assert "conditions.py" not in switched[1]


def test_reading_is_cheap():
    conditions(CPU)
    best = min(timed() for _ in range(20))
    assert best < 2e-3  # about 10 microseconds; the limit is for a busy machine


def timed():
    began = time.perf_counter()
    conditions(CPU)
    return time.perf_counter() - began


@pytest.mark.parametrize("saved", [None, {}])
def test_a_file_without_facts_is_one_difference(saved):
    told = differences(saved, conditions(CPU))
    assert len(told) == 1
    assert "does not say" in told[0]


def test_sentences_name_what_was_and_what_is():
    saved = {"device": "cpu", "torch": "2.13.0", "threads": 4, "onednn_enabled": True, "MKL_CBWR": "", "deterministic": "on"}
    now = {"device": "cpu", "torch": "2.14.0", "threads": 8, "onednn_enabled": False, "MKL_CBWR": "AVX2", "deterministic": "on"}
    assert differences(saved, now) == [
        "torch 2.13.0 then, 2.14.0 now",
        "threads of torch on the CPU 4 then, 8 now",
        "torch.backends.mkldnn.enabled on then, off now",
        "environment variable MKL_CBWR unset then, AVX2 now",
    ]


def test_another_python_or_numpy_says_what_it_can_change():
    saved, now = {"device": "cpu", "python": "3.11", "numpy": "2.4.6"}, {"device": "cpu", "python": "3.12", "numpy": "2.5.0"}
    aside = "which can change what is computed outside of torch, such as augmentation"
    assert differences(saved, now) == [f"Python 3.11 then, 3.12 now, {aside}", f"NumPy 2.4.6 then, 2.5.0 now, {aside}"]


def test_another_cpu_beside_a_gpu_says_what_it_can_change():
    for device, ending in (("cpu", "B now"), ("cuda", "B now, which can change what the CPU computes, such as augmentation")):
        assert differences({"device": device, "cpu": "A"}, {"device": device, "cpu": "B"}) == [f"CPU A then, {ending}"]


def test_another_device_is_one_difference():
    assert differences(conditions(CPU), conditions(CUDA)) == ["device cpu then, cuda now"]


@given(FACTS, FACTS)
def test_exactly_the_facts_of_both_sides_that_differ_are_told(saved, now):
    both = saved.keys() & now.keys()
    # The precisions of one kind of device are not those of another.
    ignored = module._OF_ONE_DEVICE if saved.get("device") != now.get("device") else frozenset()
    assert len(differences(saved, now)) == sum(saved[fact] != now[fact] for fact in both - ignored)


@given(st.dictionaries(st.text() | st.sampled_from([*module._FACTS]), st.none() | VALUES | st.lists(VALUES), min_size=1))
def test_whatever_a_file_holds_is_compared_on_one_line_each(saved):
    assert all(len(sentence.splitlines()) == 1 for sentence in differences(saved, conditions(CPU)))


def test_a_text_from_a_file_stays_on_its_line():
    assert differences({"device": "cpu", "torch": "2\n\x1b[31m"}, {"device": "cpu", "torch": "3"}) == ["torch 2[31m then, 3 now"]


def test_facts_that_only_one_version_knows_are_left_out():
    now = conditions(CPU)
    assert differences({**now, "phase_of_the_moon": "full"}, now) == []
    assert differences({"torch": now["torch"]}, now) == []
    assert differences({**now, "torch": torch.zeros(3)}, now) == []


def test_there_is_no_doubt_about_a_cpu():
    assert doubts(conditions(CPU)) == []
    assert doubts({"device": "cpu", "deterministic": "off", "cudnn_benchmark": True}) == []


def test_a_gpu_is_in_doubt_without_deterministic_algorithms_and_with_benchmarks():
    (off,) = doubts({"device": "cuda", "deterministic": "off", "cudnn_benchmark": False})
    assert off.startswith("torch.use_deterministic_algorithms is off, so that some operations on CUDA")
    (warns,) = doubts({"device": "cuda", "deterministic": "warn only", "cudnn_benchmark": False})
    assert warns.startswith("torch.use_deterministic_algorithms only warns")
    (measured,) = doubts({"device": "cuda", "deterministic": "on", "cudnn_benchmark": True})
    assert measured.startswith("torch.backends.cudnn.benchmark is on")
    assert doubts({"device": "cuda", "deterministic": "on", "cudnn_benchmark": False}) == []


def test_another_seed_and_another_number_of_nodes_are_told():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert differences(conditions(cpu, 0), conditions(cpu, 1)) == ["seed 0 then, 1 now"]
    assert differences(conditions(cpu, 0, 2), conditions(cpu, 0, 4)) == []  # gloo adds in order of rank
    assert "number of nodes, which decides how NCCL adds 2 then, 4 now" in differences(conditions(meta, 0, 2), conditions(meta, 0, 4))
