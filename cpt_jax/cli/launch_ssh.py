"""`cpt launch ssh`: a run on a list of hosts, started and stopped together."""

import shlex
import shutil
import sys
from argparse import Namespace

from cpt_jax import exits
from cpt_jax.cli import launching, manual
from cpt_jax.config import ConfigError
from cpt_jax.devices import launch, ssh


def parser() -> manual.Parser:
  """The flags."""
  p = launching.parser(
    "launch ssh",
    """Starts a run on all hosts at once and shows what they say, each line behind its host's name. When one ends
    badly, at Ctrl-C, and when this program is gone, all are told to save and end. The exit code is that of the first that
    failed.""",
    example="""cpt launch ssh --hosts=me@a,me@b --print -- --config=configs/domain.py --workdir=/shared/runs/domain

    Shows the two commands.""",
    exit_codes=(exits.STOPPED, exits.NOT_FINITE, exits.LOST, exits.GUARD),
  )
  p.flag("--hosts=A,B", "Hosts as ssh knows them, the first one is process 0.", [])
  p.flag("--hosts_file=FILE", "A file with a host a line instead; # begins a comment.", None)
  p.flag("--coordinator=HOST:PORT", "Where the others find the first host, if not at its name and --port.", None)
  p.flag("--port=N", "A port that is free on the first host.", 8476, low=1, high=65535)
  p.repeated("--ssh_option=NAME=VALUE", "Another of ssh's -o options, e.g. Port=2222; repeatable.")
  p.flag("--grace_secs=N", "So long the others may take to save and end, after one has ended badly. 120 by default.", 120, low=0)
  launching.add_flags(p, directory=launch.home(), python=sys.executable)
  return p


def run(args: Namespace) -> int:
  """Runs it on all hosts, or prints the commands."""
  of_hosts = launching.run_of(args, sees_our_disk=True)
  names = ssh.hosts(args.hosts, args.hosts_file)
  where = {"coordinator": args.coordinator, "port": args.port, "options": args.ssh_option}
  started = ssh.commands(of_hosts, names, **where)
  if args.print:
    launch.print_commands([shlex.join(each) for each in started], kind="gpu")
    return exits.DONE
  if shutil.which("ssh") is None:
    raise ConfigError("ssh is not on the PATH: install OpenSSH's client; --print shows the commands")
  return ssh.run_all(names, started, grace_secs=args.grace_secs)
