"""``python -m common.data.video check FOLDER`` or ``lists FOLDER OUT``."""

import tyro

from common import run
from common.data.video.check import check, lists

if __name__ == "__main__":
    run.main(lambda: tyro.extras.subcommand_cli_from_dict({"check": check, "lists": lists}))
