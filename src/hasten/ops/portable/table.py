"""Tile shapes of the portable kernels: a table by phase, element size, head_dim and kind of call.

Measured on an H200 with `python -m hasten.bench.tiles` (TFLOP/s of the kernel alone at 1k, 4k, 16k causal, then
full, 16k tokens by 2048; the records are in benchmarks/results). Other GPUs take the same lines, made to fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["plain", "rich"]


@dataclass(frozen=True)
class Tile:
    """BLOCK_M rows by BLOCK_N keys, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (phase, bytes of an element, largest padded head_dim) -> tile by kind; "rich" calls carry a bias, lists of tiles,
# dropout, a soft cap or slopes, whose values need registers that the plain kernel spends on a larger tile.
TABLE: dict[tuple[str, int, int], dict[str, Tile]] = {
    # 275 386 434 381 431 431; (64, 64, 4, 3) 288 397 438 369 422 405; (128, 64, 8, 3) 207 305 345 369 421 430
    ("forward", 2, 64): {"plain": Tile(128, 64, 4, 3), "rich": Tile(64, 64, 4, 2)},
    # 323 432 493 425 500 486; (128, 128, 8, 3) 278 417 503 403 500 525; (128, 64, 8, 3) 300 430 508 405 489 506
    ("forward", 2, 128): {"plain": Tile(64, 64, 4, 3), "rich": Tile(64, 32, 4, 3)},
    # 308 434 522 428 505 513; (128, 32, 8, 3) 289 383 468 403 473 481
    ("forward", 2, 256): {"plain": Tile(128, 64, 8, 2), "rich": Tile(64, 32, 8, 2)},
    # 309 397 439 445 482 466; (32, 128, 4, 3) 295 436 491 435 485 483 but 328 bytes of spills
    ("dkdv", 2, 64): {"plain": Tile(32, 64, 4, 3), "rich": Tile(32, 64, 4, 2)},
    # 392 510 563 479 544 521; (64, 128, 8, 3) 328 471 555 465 546 551; (64, 128, 8, 2) 339 490 577 429 532 505
    ("dkdv", 2, 128): {"plain": Tile(32, 64, 4, 3), "rich": Tile(32, 64, 8, 2)},
    # 183 221 247 224 239 245 with spills; without any, (32, 32, 8, 2) 92 117 114 108 119 110
    ("dkdv", 2, 256): {"plain": Tile(32, 64, 8, 3), "rich": Tile(32, 32, 8, 2)},
    # 416 558 609 549 626 577; (128, 64, 8, 3) 275 406 459 577 656 619
    ("dq", 2, 64): {"plain": Tile(64, 64, 4, 3), "rich": Tile(64, 32, 4, 2)},
    # 370 534 640 517 628 631; (64, 64, 4, 2) 390 519 550 500 612 607; (128, 32, 8, 3) 330 452 529 576 649 619
    ("dq", 2, 128): {"plain": Tile(128, 64, 8, 3), "rich": Tile(64, 32, 4, 2)},
    # 280 370 432 375 418 426; (128, 64, 8, 1) 291 418 503 421 485 498 but 556 bytes of spills
    ("dq", 2, 256): {"plain": Tile(128, 32, 8, 2), "rich": Tile(64, 32, 8, 2)},
    ("dbias", 2, 256): {"plain": Tile(32, 32, 4, 1)},
    # float32 is for exactness: products without tensor cores, not tuned
    ("forward", 4, 64): {"plain": Tile(64, 32, 4, 2)},
    ("forward", 4, 128): {"plain": Tile(32, 32, 4, 2)},
    ("forward", 4, 256): {"plain": Tile(32, 32, 8, 1)},
    ("dkdv", 4, 64): {"plain": Tile(32, 32, 4, 1)},
    ("dkdv", 4, 128): {"plain": Tile(32, 32, 8, 1)},
    ("dkdv", 4, 256): {"plain": Tile(16, 32, 8, 1)},
    ("dq", 4, 64): {"plain": Tile(32, 32, 4, 1)},
    ("dq", 4, 128): {"plain": Tile(32, 32, 8, 1)},
    ("dq", 4, 256): {"plain": Tile(32, 32, 8, 1)},
    ("dbias", 4, 256): {"plain": Tile(32, 32, 8, 1)},
}

# Lines that would spill elsewhere, compiled but not measured. Ampere, Ada and the small Blackwells (and AMD, as a
# guess) hold the operands of a product in registers; on data-centre Blackwell the accumulators have their own memory.
ELSEWHERE: dict[str, dict[tuple[str, int, int], dict[str, Tile]]] = {"ampere": {}, "hopper": {}, "blackwell": {}}
ELSEWHERE["blackwell"] = {
    ("forward", 2, 256): {"plain": Tile(128, 32, 8, 2), "rich": Tile(64, 32, 4, 2)},
    ("dq", 2, 128): {"plain": Tile(64, 64, 4, 2), "rich": Tile(64, 32, 4, 2)},
}
ELSEWHERE["ampere"] = {
    ("forward", 2, 64): {"plain": Tile(128, 64, 4, 3), "rich": Tile(64, 32, 4, 2)},
    ("forward", 2, 128): {"plain": Tile(64, 64, 4, 2), "rich": Tile(64, 32, 4, 2)},
    ("forward", 2, 256): {"plain": Tile(64, 32, 8, 2)},
    ("dkdv", 2, 64): {"plain": Tile(32, 64, 4, 2)},
    ("dkdv", 2, 128): {"plain": Tile(32, 64, 8, 2)},
    ("dkdv", 2, 256): {"plain": Tile(32, 32, 8, 1)},
    ("dq", 2, 64): {"plain": Tile(64, 32, 4, 2)},
    ("dq", 2, 128): {"plain": Tile(64, 32, 4, 2)},
    ("dq", 2, 256): {"plain": Tile(64, 32, 8, 1)},
    ("dbias", 2, 256): {"plain": Tile(32, 32, 8, 1)},
}


@dataclass(frozen=True)
class Limits:
    """What a GPU allows: compute capability as 10 * major + minor (0 if not NVIDIA), shared memory of a program."""

    capability: int
    shared_bytes: int

    @property
    def generation(self) -> str:
        """Which lines of `ELSEWHERE` this GPU takes."""
        return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(self.capability // 10, "ampere")


def tile(phase: str, element_size: int, block_d: int, kind: Kind, limits: Limits | None = None) -> Tile:
    """The line for a padded head_dim (the larger of q's and v's), made to fit the GPU; None is no GPU at all."""
    key = min(key for key in TABLE if key[:2] == (phase, element_size) and key[2] >= block_d)
    lines = ELSEWHERE["hopper" if limits is None else limits.generation].get(key, TABLE[key])
    line = lines.get(kind, lines["plain"])
    while limits is not None and shared_need(phase, line, element_size, block_d) > limits.shared_bytes:
        if line.num_stages > 1:
            line = replace(line, num_stages=line.num_stages - 1)
        elif line.block_m >= line.block_n and line.block_m > 16:
            line = replace(line, block_m=line.block_m // 2)
        elif line.block_n > 32:
            line = replace(line, block_n=line.block_n // 2)
        else:
            break
    return line


def shared_need(phase: str, line: Tile, element_size: int, block_d: int) -> int:
    """Bytes of shared memory a program of that tile asks for: resident operands, and the others by stage."""
    rows, keys = (1 if phase == "forward" else 2) * line.block_m, 2 * line.block_n
    resident, staged = (keys, rows) if phase == "dkdv" else (rows, keys)
    return (resident + staged * line.num_stages) * block_d * element_size + 4096
