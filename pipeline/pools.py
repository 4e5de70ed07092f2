"""Makes the work pools named on the command line, of the type `process`; those that are there stay as they are.

`prefect work-pool create` does nearly the same, but makes the server ask GitHub for a list of pool types.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.workers.process import ProcessWorker


def main(arguments: Sequence[str] | None = None) -> int:
    """For the server at PREFECT_API_URL."""
    parser = argparse.ArgumentParser(description="Makes work pools.")
    parser.add_argument("pools", nargs="+", help="their names")
    template = ProcessWorker.get_default_base_job_template()
    # Not through the worker: a flow run whose worker is killed would die of its next line of output. Prefect's pages
    # have the logs.
    template["variables"]["properties"]["stream_output"]["default"] = False
    with get_client(sync_client=True) as api:
        for name in parser.parse_args(arguments).pools:
            pool = WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template)
            try:
                api.create_work_pool(pool)
            except ObjectAlreadyExists:
                continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
