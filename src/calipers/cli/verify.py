"""The command `verify`: properties of networks from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from calipers.cli.exits import EXIT_BAD_INPUT, EXIT_OPEN, tell
from calipers.errors import BadInput


def run(
    network: str | None,
    specification: str | None,
    timeout: float | None,
    instances: str | None,
    seed: int,
    proof: str | None,
) -> None:
    """Answer one property or a list of them, and leave with the exit code.

    Raises `BadInput` for files that cannot be read or do not belong together.
    """
    from calipers.api.verify import listed
    from calipers.api.verify import verify as answer
    from calipers.report.wording import plain

    if proof is not None and not Path(proof).absolute().parent.is_dir():
        raise BadInput(
            f"there is no folder {Path(proof).parent} to write the proof to: make it first"
        )
    if instances is None and network and specification:
        found = answer(network, specification, timeout=timeout, seed=seed, proofs=proof is not None)
        print(found.answer, *([found.witness.text()] if found.witness else []), sep="\n")
        kept = [] if proof is None else _keep(proof, found.proofs)
        for note in (*found.notes, *kept):
            tell(f"calipers: {note}")
        raise typer.Exit(0 if found.decided else EXIT_OPEN)
    if instances is None or network or specification:
        raise BadInput(
            "give a network and a property (calipers verify net.onnx spec.vnnlib), or a list "
            "of them alone (--csv instances.csv)"
        )
    if proof is not None:
        raise BadInput("--proofs keeps the proof of one network and property: leave --csv away")
    worst = 0
    for one in listed(instances, timeout, seed):
        print(plain(one.line), flush=True)
        if one.error:
            tell(f"calipers: {one.error}")
        worst = max(
            worst,
            EXIT_BAD_INPUT if one.error else 0 if one.decided else EXIT_OPEN,
            key=(0, EXIT_OPEN, EXIT_BAD_INPUT).index,
        )
    raise typer.Exit(worst)


def _keep(path: str, proofs: Sequence[bytes | None]) -> list[str]:
    """Write the proof files, and return a line about each.

    They are numbered where the property has several boxes. A line holds the hash of the claim, or
    says that there is no proof.
    """
    from calipers.record.proofs import contents

    chosen, told = Path(path), []
    for i, data in enumerate(proofs):
        if data is None:
            told.append(f"box {i} was closed by a tool that writes no proof file")
        else:
            place = chosen if len(proofs) == 1 else chosen.with_stem(f"{chosen.stem}-{i}")
            place.write_bytes(data)
            told.append(f"{place} proves the claim {contents(data)[0]['claim']}")
    return told
