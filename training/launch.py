"""Several processes, as `accelerate launch` starts them; an error stays the one sentence that the stage said.

    python -m training.launch --config_file training/recipes/accelerate/ddp.yaml -m training.umt --config FILE

All options are those of `accelerate launch`, which adds a traceback of its own to what its processes say.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status of the first process that failed."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(argv)
    # It logs the exit of each process; what was wrong has been said by the process itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(args)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
