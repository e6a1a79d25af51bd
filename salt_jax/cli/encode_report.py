"""What launch.encode says in the end."""

from salt_jax.cli import encode_flags as f
from salt_jax.data.writing_latents import Report
from salt_jax.io.files import as_path

LISTED = 20  # rejected files that are printed; all are in rejected.jsonl


def print_report(report: Report, sources: int) -> None:
    """Every source is a record, a line of rejected.jsonl, or in a part that is not there yet."""
    written, rejected = report.written, len(report.rejected)
    left = (
        f" + {sources - written - rejected} in parts that are missing; {report.missing} parts are "
        "left to other "
        "processes, or to a next start"
    )
    counts = f"{sources} sources = {written} records + {rejected} left out"
    print(f"{f.DST.value}: {counts}{left if report.missing else ''}")
    for name, reason in report.rejected[:LISTED]:
        # file names may not be valid text
        print(f"  {name}: {reason}".encode(errors="replace").decode())
    if len(report.rejected) > LISTED:
        print(
            f"  ... and {len(report.rejected) - LISTED} more, in "
            f"{as_path(f.DST.value) / 'rejected.jsonl'}"
        )
