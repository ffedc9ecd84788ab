#!/bin/sh
# Install the Debian packages that the tests use: a real Slurm, a real browser, a C compiler. Nothing is done where
# they are there already, where we are not root, or where there is no apt-get.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
packages=
need() { command -v "$1" >/dev/null 2>&1 || packages="$packages $2"; }
need slurmctld slurm-wlm
need slurmdbd slurmdbd
need mariadbd mariadb-server
need munged munge
need chromium chromium
need cc gcc
[ -n "$packages" ] || exit 0
case "$packages" in *slurm-wlm*) packages="$packages slurm-wlm-basic-plugins" ;; esac
case "$packages" in *gcc*) packages="$packages libc6-dev" ;; esac
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "some tests will be skipped, for want of:$packages" >&2
    exit 0
fi
echo "installing$packages" >&2
export DEBIAN_FRONTEND=noninteractive
# The tests start their own daemons: the services that these packages bring shall not be started.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
wait_for_others="-o DPkg::Lock::Timeout=600"
apt-get $wait_for_others update -qq
# shellcheck disable=SC2086 (a list of words)
apt-get $wait_for_others install -y -qq --no-install-recommends $packages >/dev/null
