"""A worker that says hello."""

import os
import signal
import sys
from typing import Any

from iii import InvocationError, register_worker


def hello(data: dict[str, Any]) -> dict[str, str]:
    return {"message": f"Hello, {data.get('name', 'world')}, from Python!"}


def main() -> None:
    # A KeyboardInterrupt would leave the SDK's thread, and so the process, alive.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    url = os.environ.get("III_URL", "ws://localhost:49134")
    worker = register_worker(url)
    worker.register_function("hello::python", hello)

    # The SDK reconnects for as long as it takes; the engine's first answer
    # shows that the function above has reached it.
    answered = False
    while not answered:
        try:
            worker.trigger({"function_id": "engine::functions::list", "payload": {}})
            answered = True
        except InvocationError as error:
            if error.code != "TIMEOUT":
                raise
            print(f"no engine at {url} yet", file=sys.stderr, flush=True)
    print("ready", flush=True)


if __name__ == "__main__":
    main()
