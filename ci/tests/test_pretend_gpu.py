"""The pretend GPU refuses what CUDA refuses and sees where the host waits; under it every paper trains without waiting.

In processes of their own: there is no way back from it.
"""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.list import papers

ROOT = Path(__file__).resolve().parent.parent.parent
GIVEN = ROOT.parent / "shared" / "tools" / "pretend_gpu" / "pg_run.py"
QUIET = ["--workers", "0", "--log-every", "1000", "--checkpoint-every", "1000"]


def python(*words: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KERNEL_BACKEND": "reference"} | environment
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def trained(folder: Path, *words: str, **environment: str) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Waits by optimizer step, from the first update to the last, and what broke compiled graphs."""
    report = folder / "report.json"
    done = python("-m", "ci.pretend_gpu", *words, "--out", str(folder), PRETEND_REPORT=str(report), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    return found["steps"][1:-1], found["graph_breaks"]


START = """
import torch
from ci import pretend_gpu
pretend_gpu.install()
x, host = torch.randn(3, 4, device="cuda"), torch.randn(3, 4)
weight = torch.nn.Linear(4, 2)
"""
REFUSED = {
    "x + host": "same device", "weight(x)": "same device", "torch.zeros(()).add_(x.sum())": "same device",
    "host[torch.zeros(2, dtype=torch.long, device='cuda')]": "cpu",
    "x.numpy()": "numpy", "x.normal_(generator=torch.Generator())": "generator",
    "x + torch.ones(3, 4, device='cuda:1')": "same device", "torch.cuda.set_device(2)": "ordinal",
    "x.pin_memory()": "pin", "torch.nn.functional.conv2d(x[None, None], host[None, None])": "same device",
}
WAITS = {
    "x.sum().item()": 1, "bool((x > 0).any())": 1, "x[x > 0]": 1, "x.cpu()": 1, "torch.tensor([1.0], device='cuda')": 1,
    "host.to('cuda', non_blocking=True)": 1, "host.pin_memory().to('cuda')": 1, "torch.cuda.synchronize()": 1,
    "host.pin_memory().to('cuda', non_blocking=True)": 0, "x * 2 + torch.tensor(1.0)": 0, "x.nonzero()": 1,
    "torch.zeros(3, device='cuda')": 0, "x[torch.arange(2, device='cuda')]": 0, "x[torch.arange(2)]": 1,
    "x.softmax(1).max(0)": 0, "torch.where(x > 0, x, 0.0)": 0,
}


def test_what_is_refused_and_what_waits():
    script = START + f"""
for line, word in {REFUSED!r}.items():
    try:
        eval(line)
    except Exception as error:
        assert word in str(error), (line, error)
    else:
        raise SystemExit(f"allowed: {{line}}")
for line, times in {WAITS!r}.items():
    with pretend_gpu.waits.counted() as found:
        eval(line)
    assert sum(found.values()) == times, (line, found)
"""
    done = python("-c", script, PRETEND_DEVICES="2")
    assert done.returncode == 0, done.stderr


def test_it_computes_what_a_cpu_does():
    """A network with a frozen part, forward, backward and three updates: the same bits."""
    script = START + """
import copy, torchvision
torch.manual_seed(0)
nets = [torchvision.models.resnet18(num_classes=5)]
nets.append(copy.deepcopy(nets[0]).cuda())
images, labels, losses = torch.randn(4, 3, 32, 32), torch.arange(4), []
for net in nets:
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), foreach=False)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(net(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=False)
        optimizer.step()
        losses.append(loss.item())
assert losses[:3] == losses[3:], losses
with torch.autocast("cuda", torch.bfloat16):
    assert nets[1](images.cuda()).dtype == torch.bfloat16
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


MUTANTS = {  # in papers/shiftvit/train.py: what stands there, what it becomes, and what is said of it
    "labels left on the CPU": ("labels.to(world.device, non_blocking=True)", "labels", "same device"),
    "a sum left on the CPU": ("torch.zeros((), device=world.device)", "torch.zeros(())", "same device"),
    "an added item": ("part.backward()", "part.backward(); part.item()", "train.py:88"),
    "an added print of a tensor": ("part.backward()", "part.backward(); print(part)", "train.py:88"),
    "an added condition": ("part.backward()", "part.backward() if part > 0 else None", "train.py:88"),
    "batches sent from pageable memory": ("pixels.to(", "pixels.clone().to(", "train.py:77"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_a_trainer_is_seen(name, tmp_path):
    old, new, said = MUTANTS[name]
    path = ROOT / "papers" / "shiftvit" / "train.py"
    source = path.read_text()
    assert source.count(old) == 1
    line = 1 + source[: source.index(old)].count("\n")
    script = f"""
import sys
from ci import pretend_gpu
pretend_gpu.install()
import papers.shiftvit.train as module
from papers.shiftvit.recipes import RECIPES
from common.run.door import door
exec(compile({source.replace(old, new)!r}, {str(path)!r}, "exec"), module.__dict__)
sys.argv = ["shiftvit", "smoke", "--out", {str(tmp_path)!r}, "--stop-at", "4", *{QUIET!r}]
door("shiftvit", RECIPES, module.train)
"""
    report = tmp_path / "report.json"
    done = python("-c", script, PRETEND_REPORT=str(report))
    if said == "same device":
        assert done.returncode == 1 and said in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        steps = json.loads(report.read_text())["steps"][1:-1]
        assert all(sum(step.values()) > 1 and f"train.py:{line}" in str(step) for step in steps), steps


@pytest.mark.slow
@pytest.mark.parametrize("paper", papers())
def test_a_training_step_waits_once_at_most(paper, tmp_path):
    """For the norm of the gradient, or the loss: is it finite? Steps that log, save or evaluate are others."""
    steps, _ = trained(tmp_path, f"papers.{paper}", "smoke", "--stop-at", "5", *QUIET)
    assert len(steps) == 4
    for step in steps:
        assert sum(step.values()) <= 1, "\n".join(f"{n} {line}" for line, n in step.items())


TRACKERS = {  # how one is made of a recipe, the network untrained
    "sbt": "from papers.sbt.tracker import SBTTracker as Tracker; "
           "tracker = Tracker(build(recipe).cuda().eval(), recipe)",
    "dualtfr": "from papers.dualtfr.tracker import DualTFRTracker as Tracker; "
               "tracker = Tracker(build(recipe).cuda().eval(), recipe)",
    "maml_tracker": "from papers.maml_tracker.tracker import MAMLTracker as Tracker; "
                    "tracker = Tracker(build(recipe).cuda().eval(), recipe, World(0, 1, torch.device('cuda'), None))",
}


@pytest.mark.slow
@pytest.mark.parametrize("paper", TRACKERS)
def test_a_tracked_frame_waits_for_the_answer_alone(paper):
    script = START + f"""
import numpy as np
from common.run import World
from papers.{paper}.evaluate import build
from papers.{paper}.recipes import RECIPES
recipe = RECIPES["tiny"]
{TRACKERS[paper]}
frames = np.random.default_rng(0).integers(0, 255, (6, 90, 120, 3), dtype=np.uint8)
tracker.init(frames[0], (40.0, 30.0, 30.0, 24.0))
tracker.track(frames[1])  # constants are made once
for frame in frames[2:]:
    with pretend_gpu.waits.counted() as found:
        tracker.track(frame)
    assert len(found) == 1 and sum(found.values()) == 1, found
    (((what, line), _),) = found.items()
    assert what.startswith("copy to the host") and "tracker.py" in line, found
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("paper", sorted(set(papers()) - {"maml_tracker"}))  # whose option text says why not
def test_a_compiled_training_is_one_graph(paper, tmp_path):
    _, breaks = trained(tmp_path, f"papers.{paper}", "smoke", "--stop-at", "1", "--compile", *QUIET)
    assert not breaks


@pytest.mark.long
@pytest.mark.parametrize("paper", papers())
def test_a_run_from_beginning_to_end(paper, tmp_path):
    """Training in bf16, stopped and resumed, evaluation, export, pictures."""
    trained(tmp_path, f"papers.{paper}", "smoke", "--stop-at", "5", "--workers", "0")
    steps, _ = trained(tmp_path, f"papers.{paper}", "smoke", "--resume", "auto", "--workers", "0")
    (results,) = tmp_path.glob(f"{paper}/smoke/*/results.json")
    assert json.loads(results.read_text())["hardware"].startswith("1x Pretend GPU") and steps


@pytest.mark.long
def test_meta_training_waits_once_at_most(tmp_path):
    """MAML's detection comes first: its second stage has steps of its own."""
    steps, _ = trained(tmp_path, "papers.maml_tracker", "smoke", *QUIET)
    often = collections.Counter(sum(step.values()) for step in steps)
    assert often[1] >= len(steps) - 2, steps  # but for the change of stages, which saves


@pytest.mark.long
def test_what_needs_a_gpu_passes():
    """The tests marked gpu, without those of CUDA graphs, which the pretend GPU has not."""
    done = python("-m", "pytest", "-q", "-m", "gpu", "-k", "not graph", "papers", "common/run", PRETEND_GPU="1")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


@pytest.mark.long
@pytest.mark.skipif(not GIVEN.exists(), reason="CUDA graphs need the pretend GPU of ../shared/tools")
def test_the_benchmark_under_cuda_graphs():
    arguments = ["--graphs", "--only", "1x12x1x1", "--batch", "2", "--seconds", "0.01"]
    done = python(str(GIVEN), "common.kernels.bench", "shift", *arguments)
    assert done.returncode == 0, done.stderr


def test_every_process_can_have_it():
    """As in a rehearsal of ci/gpu.sh."""
    done = python("-c", "import torch; print(torch.ones(2, device='cuda').device)", PRETEND_GPU="1",
                  PYTHONPATH=str(ROOT / "ci" / "pretend_gpu" / "site"))
    assert done.stdout.strip() == "cuda:0", done.stderr
