"""An entry module as a user of verl has one, with the two lines of docs/verl.md."""

import hydra
from verl.trainer.main_ppo import run_ppo

from gradstore.trainer.verl import task_runner


@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)
def main(config):  # type: ignore[no-untyped-def]
    run_ppo(config, task_runner_class=task_runner())


if __name__ == "__main__":
    main()
