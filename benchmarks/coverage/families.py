"""What holds for a small network of every timm family: stages, freezing, cuts, exports.

    python benchmarks/coverage/families.py [--only vgg,swin_transformer] [--limit N] [--jobs N]

Weights are random. Each network runs in a process of its own with limits of time and memory, so
that a crash costs one row. Rows are appended to a JSONL file (`--log`); what it holds is not done
again, so that an interrupted command is repeated to go on. The table goes to docs/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

FAMILIES = (
    "beit:beit_base_patch16_224 byoanet:halonet_h1 byobnet:mobileone_s0 cait:cait_xxs24_224 "
    "coat:coat_lite_tiny convit:convit_tiny convmixer:convmixer_768_32 convnext:convnext_atto "
    "cpubone:cpubone_nano crossvit:crossvit_tiny_240 csatv2:csatv2 cspnet:cs3darknet_s "
    "cspnext:cspnext_tiny davit:davit_tiny deepseek_vit:deepseek_vit_412m "
    "deit:deit_tiny_distilled_patch16_224 densenet:densenet121 dla:dla46_c dpn:dpn48b "
    "edgenext:edgenext_xx_small efficientformer:efficientformer_l1 "
    "efficientformer_v2:efficientformerv2_s0 efficientnet:efficientnet_b0 "
    "efficientvim:efficientvim_m1 efficientvit_mit:efficientvit_b0 "
    "efficientvit_msra:efficientvit_m0 eva:eva02_tiny_patch14_224 fasternet:fasternet_t0 "
    "fastvit:fastvit_t8 focalnet:focalnet_tiny_srf gcvit:gcvit_xxtiny "
    "gemma4_vit:gemma4_vit_167m ghostnet:ghostnet_050 hardcorenas:hardcorenas_a hgnet:hgnetv2_b0 "
    "hiera:hiera_tiny_224 hieradet_sam2:hieradet_small hrnet:hrnet_w18_small iformer:iformer_t "
    "inception_next:inception_next_atto inception_resnet_v2:inception_resnet_v2 "
    "inception_v3:inception_v3 inception_v4:inception_v4 lcnetv2:lcnetv2_small levit:levit_128s "
    "lowformer:lowformer_b0 mambaout:mambaout_femto maxxvit:test_maxvit "
    "metaformer:poolformerv2_s12 mlp_mixer:gmlp_ti16_224 mobilenetv3:mobilenetv3_small_050 "
    "mobilenetv5:mobilenetv5_base mobilevit:mobilevit_xxs mvitv2:mvitv2_tiny "
    "naflexvit:naflexvit_base_patch16_gap nasnet:nasnetalarge nest:nest_tiny "
    "nextvit:nextvit_small nfnet:nf_regnet_b0 pit:pit_ti_224 pnasnet:pnasnet5large "
    "pvt_v2:pvt_v2_b0 qwen3_vit:qwen3_vit_88m rdnet:rdnet_tiny regnet:regnetx_002 "
    "repghost:repghostnet_050 repvit:repvit_m1 res2net:res2next50 resnest:resnest14d "
    "resnet:resnet18 resnetv2:resnetv2_18 rexnet:rexnet_100 selecsls:selecsls42 "
    "senet:legacy_seresnet18 sequencer:sequencer2d_s shvit:shvit_s1 sknet:skresnet18 "
    "starnet:starnet_s050 swiftformer:swiftformer_xs "
    "swin_transformer:swin_tiny_patch4_window7_224 swin_transformer_v2:swinv2_tiny_window8_256 "
    "swin_transformer_v2_cr:swinv2_cr_tiny_224 tiny_vit:tiny_vit_5m_224 "
    "tnt:tnt_s_patch16_224 tresnet:tresnet_m twins:twins_svt_small vgg:vgg11 "
    "visformer:visformer_tiny vision_transformer:vit_tiny_patch16_224 "
    "vision_transformer_hybrid:vit_tiny_r_s16_p8_224 "
    "vision_transformer_relpos:test_vit_relpos vision_transformer_sam:samvit_base_patch16_224 "
    "vitamin:vitamin_small_224 volo:volo_d1_224 vovnet:ese_vovnet19b_slim_dw "
    "xception:legacy_xception xception_aligned:xception41 xcit:xcit_nano_12_p16_224"
)  # fmt: skip
CHECKS = ("partition", "order", "features", "freezing", "cut", "onnx", "torchscript")
SIZES = (64, 128)  # pixels, before a network's own size
TIME_LIMIT = 300  # seconds of wall time a network
MEMORY_LIMIT = 24 * 2**30  # bytes of addresses; torch alone takes several GiB of them
TOLERANCE = 1e-3  # of the largest logit: another library rounds differently
REPORT = Path(__file__).parents[2] / "docs" / "results" / "coverage.md"

Row = dict[str, Any]


# --- one network, in its own process -------------------------------------------------------------


def examine(name: str) -> None:
    """Check one network; print one JSON object a finding, so that a crash loses only the rest."""
    import torch

    torch.set_num_threads(1)
    plugin, size = _fitting(name)
    backbone = plugin(image_size=size)
    count = sum(each.numel() for each in backbone.module.parameters())
    _tell(parameters=count, stages=len(backbone.stages), image_size=size)
    for check, ask in _checks(plugin, size).items():
        started = time.perf_counter()
        try:
            reason = ask()
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding
            words = str(error) if isinstance(error, AssertionError) else repr(error)
            words = re.sub(r"/\S*/(?=model\.)", "", words)  # no paths of this machine
            reason = " ".join(words.split())[:300] or repr(error)
        _tell(**{check: reason, f"{check}_seconds": round(time.perf_counter() - started, 1)})


def _tell(**finding: Any) -> None:
    sys.stdout.write(json.dumps(finding) + "\n")
    sys.stdout.flush()


def _fitting(name: str) -> tuple[Callable[..., Any], int]:
    """Return the plugin for `name` and the smallest of the sizes at which it runs."""
    import torch

    from autoft.backbones.timm import timm as any_of_timm

    def plugin(*, image_size: int = 0, pretrained: bool = False) -> Any:
        return any_of_timm(model=name, image_size=image_size, pretrained=False)

    own = plugin().image_size
    for size in [each for each in SIZES if each < own]:
        with contextlib.suppress(Exception), torch.no_grad():  # refused in any way
            plugin(image_size=size).module.eval()(torch.randn(2, 3, size, size))
            return plugin, size
    return plugin, own


def _checks(plugin: Callable[..., Any], size: int) -> dict[str, Callable[[], str]]:
    from autoft.testing import backbones

    def passes(check: Callable[..., None]) -> Callable[[], str]:
        return lambda: check(plugin, image_size=size) or ""

    return {
        "partition": passes(backbones.check_stages_partition_parameters),
        "order": passes(backbones.check_stages_run_in_order),
        "features": passes(backbones.check_features_have_promised_shape),
        "freezing": passes(backbones.check_frozen_prefix_stays_equal),
        "cut": lambda: _cut(plugin, size),
        "onnx": lambda: _onnx(plugin, size),
        "torchscript": lambda: _torchscript(plugin, size),
    }


def _cut(plugin: Callable[..., Any], size: int) -> str:
    from autoft.network.cut import why_uncut

    backbone = plugin(image_size=size)
    _shake(backbone.module)
    return why_uncut(backbone, size)


def _shake(module: Any) -> None:
    """Move parameters that begin at one value, such as 0 for a scale: nothing may hide there."""
    import torch

    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.unique().numel() == 1:
            with torch.no_grad():
                parameter.add_(torch.empty_like(parameter).normal_(0.1, 0.1))


def _network(plugin: Callable[..., Any], size: int) -> tuple[Any, Any, Any, Any]:
    """Return a network with a linear head, its preprocessing, images (3, ...) and logits."""
    import torch

    from autoft.network.assemble import Network
    from autoft.values import Preprocess

    torch.manual_seed(0)
    backbone = plugin(image_size=size)
    network = Network(backbone, torch.nn.Linear(backbone.num_features, 3)).eval()
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        return network, Preprocess(size, size), images, network(images).numpy()


def _onnx(plugin: Callable[..., Any], size: int) -> str:
    import onnxruntime

    from autoft.export.onnx import metadata_of, to_onnx

    network, pre, images, expected = _network(plugin, size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx(network, path, pre, metadata_of(["a", "b", "c"], pre, {}))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return _difference(session.run(["logits"], {"images": images.numpy()})[0], expected)


def _torchscript(plugin: Callable[..., Any], size: int) -> str:
    import torch

    from autoft.export.torchscript import to_torchscript

    network, pre, images, expected = _network(plugin, size)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "model.ts"
        to_torchscript(network, path, pre)
        return _difference(torch.jit.load(path)(images).numpy(), expected)


def _difference(found: Any, expected: Any) -> str:
    worst = float(abs(found - expected).max() / abs(expected).max())
    return "" if worst <= TOLERANCE else f"logits differ by {worst:.2g} of the largest"


# --- all of them ---------------------------------------------------------------------------------


def supervised(family: str, name: str, seconds: float) -> Row:
    """Examine a network in another process and return its row."""
    started = time.perf_counter()
    row: Row = {"family": family, "model": name, "timm": version("timm")}
    command = [sys.executable, __file__, "--child", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=out, stderr=errors, env=environment, preexec_fn=_limit_memory
        )
        try:
            code = child.wait(seconds)
            end = f"the process ended with code {code}"
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            code, end = 0, f"not done after {seconds:.0f} s"
        out.seek(0)
        errors.seek(0)
        for line in out:
            if line.startswith("{"):
                row |= json.loads(line)
        if code and (text := errors.read().strip()):
            end = text.splitlines()[-1][:300]
    for check in CHECKS:
        row.setdefault(check, end)
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))


def families(only: str) -> Iterator[tuple[str, str]]:
    """Yield the families and the network that stands for each; `only` names some."""
    wanted = {name for name in only.split(",") if name}
    for pair in FAMILIES.split():
        family, _, name = pair.partition(":")
        if not wanted or family in wanted or name in wanted:
            yield family, name


def read(log: Path) -> dict[str, Row]:
    """Return the rows of `log` by model; the last of a model counts."""
    lines = log.read_text("utf-8").splitlines() if log.exists() else []
    return {row["model"]: row for row in map(json.loads, lines)}


# --- the page ------------------------------------------------------------------------------------


def page(rows: list[Row]) -> str:
    """Return docs/results/coverage.md."""
    rows = sorted(rows, key=lambda row: str(row["family"]))
    return "\n".join(["# Coverage of timm's families", "", *_summary(rows), "", *_table(rows), ""])


def _summary(rows: list[Row]) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("timm", "torch", "onnxruntime"))
    total = sum(row["seconds"] for row in rows)
    stages = [row["stages"] for row in rows if "stages" in row]
    lines = [
        f"One network of each of {len(rows)} families, random weights, images as small as it "
        f"takes, on the CPU: {versions}, Python {platform.python_version()}. It took "
        f"{total / 60:.0f} minutes of one process after another (median "
        f"{statistics.median(row['seconds'] for row in rows):.0f} s a network), with other work "
        "on the machine. Made by `python benchmarks/coverage/families.py`.",
        "",
        f"Stages: {min(stages)} to {max(stages)}, median {statistics.median(stages):.0f}.",
        "",
        "| what | holds for | share |",
        "|---|---|---|",
    ]
    for check, words in WORDS.items():
        good = sum(not row[check] for row in rows)
        lines.append(f"| {words} | {good} of {len(rows)} | {good / len(rows):.1%} |")
    exceptions = [(row, check) for row in rows for check in CHECKS if row[check]]
    lines += ["", "## Exceptions", ""]
    lines += [f"- **{row['model']}**, {check}: {_cell(row[check])}" for row, check in exceptions]
    return lines if exceptions else [*lines, "None."]


WORDS = {
    "partition": "every parameter lies in one stage",
    "order": "stages follow the order of the forward pass",
    "features": "features have the promised width",
    "freezing": "freezing keeps parameters and buffers bit-equal, at every depth",
    "cut": "cut after every stage, equal to the whole",
    "onnx": "ONNX gives the same logits",
    "torchscript": "TorchScript gives the same logits",
}


def _table(rows: list[Row]) -> list[str]:
    heads = ("family", "model", "parameters", "image", "stages", *CHECKS, "seconds")
    lines = ["## All", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [
            row["family"],
            row["model"],
            f"{row['parameters'] / 1e6:.1f}M" if "parameters" in row else "",
            str(row.get("image_size", "")),
            str(row.get("stages", "")),
            *("no" if row[check] else "yes" for check in CHECKS),
            f"{row['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "(").replace(">", ")")


def main() -> None:
    """Examine what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="families or models, by commas")
    parser.add_argument("--limit", type=int, default=10**6, help="no more than so many")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--seconds", type=float, default=TIME_LIMIT, help="limit of a network")
    parser.add_argument("--log", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--report", type=Path, default=REPORT)
    given = parser.parse_args()
    if given.child:
        examine(given.child)
        return
    done = read(given.log)
    missing = [pair for pair in families(given.only) if pair[1] not in done][: given.limit]
    with ThreadPoolExecutor(given.jobs) as pool, given.log.open("a", encoding="utf-8") as log:
        for row in pool.map(lambda pair: supervised(*pair, given.seconds), missing):
            log.write(json.dumps(row) + "\n")
            log.flush()
            failed = [check for check in CHECKS if row[check]]
            sys.stdout.write(f"{row['model']}: {row['seconds']} s, failed: {failed or 'none'}\n")
            sys.stdout.flush()
    names = {name for _, name in families("")}
    rows = [row for name, row in read(given.log).items() if name in names]
    if rows:
        given.report.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
