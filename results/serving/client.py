"""Times a policy server through openpi's own client, and compares what several clients get.

    python evaluate.py --serve --checkpoint openvla --port 8000         # in another terminal
    pip install openpi-client==0.1.2 typing_extensions                  # in another environment
    python results/serving/client.py --port 8000 --requests 1000 --clients 4

One client sends the requests one after the other; then several clients send them at once. If the
server runs `--checkpoint openvla --decoding greedy`, an answer depends on the request alone, and
--compare counts answers that differ between clients. Otherwise each client has its own noise.
"""

import argparse
import concurrent.futures
import time

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

SCENES = 20


def request(number):
    """Return an observation of LIBERO's shape: noise in place of a picture."""
    rng = np.random.default_rng(number % SCENES)
    return {
        "observation/image": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8),
        "observation/state": np.zeros(8, np.float32),
        "prompt": "open the drawer",
    }


def run_client(port, count):
    """Return seconds (count,) of the round trips, first answers by scene, repeats that differ."""
    client = WebsocketClientPolicy("127.0.0.1", port)
    seconds = []
    answers = {}
    wrong = 0
    for number in range(count):
        observation = request(number)
        start = time.perf_counter()
        actions = client.infer(observation)["actions"]
        seconds.append(time.perf_counter() - start)
        first = answers.setdefault(number % SCENES, actions)
        wrong += not np.array_equal(first, actions)
    return np.array(seconds), answers, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--requests", type=int, default=1000, help="of all clients together")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--compare", action="store_true", help="count answers that differ")
    args = parser.parse_args()
    seconds, expected, wrong = run_client(args.port, args.requests)
    median, p99 = 1000 * np.quantile(seconds, [0.5, 0.99])
    print(f"1 client: {len(seconds)} round trips, median {median:.1f} ms, p99 {p99:.1f} ms")
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(args.clients) as pool:
        share = args.requests // args.clients
        runs = list(pool.map(run_client, [args.port] * args.clients, [share] * args.clients))
    rate = args.clients * share / (time.perf_counter() - start)
    for _, answers, unequal in runs:
        wrong += unequal
        for scene, actions in answers.items():
            wrong += not np.array_equal(expected[scene], actions)
    print(f"{args.clients} clients: {rate:.1f} requests/s")
    if args.compare:
        print(f"answers that differ: {wrong}")


if __name__ == "__main__":
    main()
