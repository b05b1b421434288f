"""``graftwork serve``: a model over HTTP."""

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from graftwork.errors import UserError, one_line
from graftwork.pipelines.terminal import Output, console, fail
from graftwork.tracking import tracking_uri


def serve(
    model: Annotated[str, typer.Argument(help="Model folder, models:/NAME@ALIAS or models:/NAME/VERSION.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 in a container. There is no login: keep it private.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    max_request_mb: Annotated[int, typer.Option(min=1, max=1024, help="Largest request.")] = 32,
    max_images: Annotated[
        int, typer.Option("--max-examples", "--max-images", min=1, help="Most images or texts in a request.")
    ] = 256,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests worked on at once; more get status 503.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds for a request to arrive.")] = 30.0,
    output: Output = Path("runs"),
) -> None:
    """Serve a model over HTTP: POST /invocations as MLflow's server takes it, or an image or a text as the body."""
    from graftwork.predicting import model_folder

    # The log: stderr, one line an event.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    # A container's first process ignores a signal that it has no handler for, as it would while the network is loaded.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        folder = model_folder(model, tracking_uri(output))
        from graftwork import serving
        from graftwork.model import read_info

        info = read_info(folder)
        limits = serving.Limits(max_request_mb * 2**20, max_images, concurrency, timeout)

        def announce(address: str) -> None:
            what = f"{info['backbone']}, {len(info['classes'])} classes"
            console.print(
                f"serving {escape(one_line(model))} ({escape(one_line(what))}) at {address}",
                highlight=False,
                soft_wrap=True,
            )

        serving.serve(folder, host, port, limits, announce)
    except UserError as error:
        fail(str(error))
