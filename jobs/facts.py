"""Texts in the six partitions of the word-order study, and queries, from a list of facts.

python jobs/facts.py facts.jsonl runs/facts      # your facts (infscan/studies/partitions.py says what a row is)
python jobs/facts.py runs/facts                  # the demo's
python jobs/scan.py queries.path=runs/facts/queries.jsonl output=runs/mine ...
python jobs/explain.py run=runs/mine name=facts texts=runs/facts/texts.jsonl own_tokens=false
python jobs/study.py study=word_order run=runs/mine study.texts=runs/facts/texts.jsonl
"""

import json
import sys

from infscan.errors import ConfigError
from infscan.storage import Store
from infscan.studies.facts import FACTS, queries
from infscan.studies.partitions import read_facts, texts_of
from infscan.telemetry import sentences


def main(arguments: list[str]) -> None:
    with sentences():
        if not 1 <= len(arguments) <= 2:
            raise ConfigError("Give [a JSONL file of facts and] the folder that queries and texts are written to.")
        facts = read_facts(arguments[0]) if len(arguments) > 1 else FACTS
        store = Store(arguments[-1])
        for name, rows in (("queries.jsonl", queries(facts)), ("texts.jsonl", texts_of(facts))):
            store.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            print(f"{store.uri}/{name}: {len(rows)} rows")


if __name__ == "__main__":
    main(sys.argv[1:])
