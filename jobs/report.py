"""Write the page that people read, report.html: of a finished run, of a sweep's folder, or of several runs.

python jobs/report.py run=runs/demo
python jobs/report.py 'run=[runs/demo,runs/demo-dot-product]' output=compared.html
"""

import hydra
from omegaconf import DictConfig, ListConfig

from infscan.config import absolute
from infscan.report.write import write_report
from infscan.telemetry import command, console, sentences, shown


@hydra.main(version_base=None, config_path="../conf", config_name="report")
def main(cfg: DictConfig) -> None:
    with sentences():
        runs = list(cfg.run) if isinstance(cfg.run, ListConfig) else [cfg.run]
        output = absolute(cfg.output) if cfg.output else None
        page, unfinished = write_report(
            [absolute(run) for run in runs], output, rows=cfg.rows, megabytes=cfg.megabytes, tokenizer=cfg.tokenizer
        )
        for run in unfinished:
            console().print(shown(f"warning: {run} is not finished, and not on the page"), style="yellow", markup=False)
        print(page)


if __name__ == "__main__":
    command(main)
