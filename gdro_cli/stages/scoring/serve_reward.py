"""``gdro rewards serve``: a reward behind the protocol of ``reward.kind: http``."""

from __future__ import annotations

from collections.abc import Callable

from gdro_cli.config.rules import variable_problem
from gdro_cli.config.sections import RewardSection
from gdro_cli.errors import UserError
from gdro_cli.rewards.address import read_key
from gdro_cli.rewards.pool import usable_cores
from gdro_cli.rewards.registry import open_reward, provenance
from gdro_cli.stages.setup.scorers import make_reward_pool


def run(section: RewardSection, *, host: str, port: int, key_env: str | None, say: Callable[[str], object]) -> None:
    """Answer requests until a signal ends the server.

    Args:
        section: names the reward, and has its settings, workers and time limit.
        host: address to listen on.
        port: port; 0 for any free one.
        key_env: environment variable with the key that requests must have.
        say: prints the address, once requests are answered.

    Raises:
        UserError: the address cannot be used, ``key_env`` does not name a variable, or others could reach the server
            without a key.
        PrerequisiteError: the server's packages, the key, or something that the reward needs is missing.
    """
    from gdro_cli.rewards.http.packages import check_packages

    check_packages()
    from gdro_cli.rewards.http import server

    if key_env is not None and (problem := variable_problem(key_env, example="REWARD_API_KEY")):
        raise UserError(f"--key-env {problem}")
    key = read_key(key_env, owner="the server's")
    if key is None and host not in server.LOOPBACK:
        raise UserError(
            f"others can reach {host}: name the environment variable with a key that they must send with --key-env, or"
            " leave --host out"
        )
    reward = open_reward(section)
    version = provenance(reward)
    with server.listen(host, port) as listener, make_reward_pool(reward, section, cores=usable_cores()) as pool:
        app = server.make_app(reward, version, pool, key=key)
        shown = f"[{host}]" if ":" in host else host
        say(f"the reward {reward.name} is at http://{shown}:{listener.getsockname()[1]} (Ctrl-C ends the server)")
        server.run(app, listener)
