"""How many of the planted facts' forward documents are each question's ten strongest, run by run.

python jobs/answers.py multi-stage=runs/answers single-stage=runs/answers-single     (finished runs)
"""

import sys

from infscan.results.read import read_top
from infscan.studies.facts import Partition
from infscan.studies.word_order import planted_partitions
from infscan.telemetry import sentences

PLANTED = "infscan://demo/planted.jsonl"


def forward_on_top(run: str, suffix: str) -> list[int]:
    """Per fact, of the query `<fact><suffix>`."""
    rows = [row for row in read_top(run).to_pylist() if row["side"] == "proponent" and row["rank"] <= 10]
    found = []
    for fact, partitions in planted_partitions(PLANTED).items():
        mine = [row["document_id"] for row in rows if row["query_id"] == f"{fact}{suffix}"]
        found.append(sum(partitions.get(document) is Partition.FORWARD for document in mine))
    return found


def main(arguments: list[str]) -> None:
    with sentences():
        print("Forward documents among the ten strongest (of 10), by fact\n")
        for name, run in (argument.split("=", 1) for argument in arguments):
            for measure, suffix in (("whole answer", ""), ("first token", "-first")):
                counts = forward_on_top(run, suffix)
                print(f"{name:<14} {measure:<13} {sum(counts):>3} of {10 * len(counts)}   {counts}")


if __name__ == "__main__":
    main(sys.argv[1:])
