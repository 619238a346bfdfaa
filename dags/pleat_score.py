"""The DAG `pleat_score`: the champion classifies a folder of images, or a prefix of an S3 store."""

from airflow.sdk import DAG, Param
from pleat_operators import RETRIES, ScoreOperator

ABOUT = """\
### Classifies images with the champion

Answers go into a Parquet file, a row for each image; an image that cannot be read has a row with the reason. The log
says how many images a second it took.
"""

with DAG(
    "pleat_score",
    description="Classify images with the champion",
    doc_md=ABOUT,
    schedule=None,
    catchup=False,
    params={
        "images": Param(
            type="string", minLength=1, title="Images", description="A folder on the worker, or s3://bucket/prefix."
        ),
        "out": Param(
            type="string",
            pattern=r"\.parquet$",
            title="Answers",
            description="A .parquet file on the worker, or s3://bucket/name.parquet.",
        ),
        "version": Param(
            None, type=["string", "null"], pattern="^[0-9]+$", title="Version", description="Empty: the champion."
        ),
    },
    default_args=RETRIES,
    tags=["pleat"],
) as dag:
    ScoreOperator(task_id="score", doc_md="Reads the images, asks the champion, writes the answers.")
