# Run by other_user.rs in a mount namespace of its own: PROGRAM IMAGE NAME...
# Does as user 65534 what users other than root do with mounts. 77: cannot be tried here.
program=$1 image=$2
shift 2
fail() { echo "$name: $*"; exit 1; }
user() { setpriv --reuid 65534 --regid 65534 --clear-groups env HOME=/nonexistent SNAPSTORE_RUNTIME_DIR="$PWD/user/run" "$@"; }
gone() { # until it has ended; its parent may be slow to ask for that
  for try in $(seq 3000); do
    grep -q '^State:[[:space:]]*[A-Ya-z]' "/proc/$1/status" 2>/dev/null || return
    sleep 0.02
  done
  fail "the server does not end"
}
mkdir device user
mount -t tmpfs none device && mknod -m 666 device/fuse c 10 229 && mount --bind device/fuse /dev/fuse || exit 77
command -v setpriv fusermount3 >/dev/null || exit 77
chown 65534 user
for name; do
  snap() { user "$program" --store "user/store $name" "$@"; }
  mnt="user/mnt $name"
  user mkdir "$mnt"
  snap init >/dev/null || fail "init"
  snap commit base --memory "$image" >/dev/null || fail "commit"
  snap mount base "$mnt" >/dev/null || fail "mount"
  user cmp "$mnt/memory.bin" "$image" || fail "read"
  snap mount base "$mnt" 2>/dev/null
  [ $? = 5 ] || fail "mounted twice"
  snap umount "$mnt" >/dev/null || fail "umount"
  snap umount "$mnt" 2>/dev/null
  [ $? = 3 ] || fail "unmounted twice"

  # One that is written to.
  snap mount --rw base "$mnt" --overlay-dir user >/dev/null || fail "mount --rw"
  printf written | user dd of="$mnt/memory.bin" conv=notrunc status=none || fail "write"
  user sh -c 'echo state >"$1/vmstate"' sh "$mnt" || fail "make a file"
  snap commit next --mount "$mnt" >/dev/null || fail "commit --mount"
  snap umount "$mnt" >/dev/null || fail "umount what was written"
  snap mount next "$mnt" >/dev/null || fail "mount what was written"
  [ "$(user head -c 7 "$mnt/memory.bin")" = written ] || fail "what was written is not there"
  snap umount "$mnt" >/dev/null || fail "umount"

  # The server's end undoes it, also when it is killed and mounted over.
  server=$(snap mount base "$mnt" --json | grep -o '"server_pid":[0-9]*' | cut -d: -f2)
  kill -TERM "$server"
  gone "$server"
  snap umount "$mnt" 2>/dev/null
  [ $? = 3 ] || fail "a server that was told to end has left its mount"
  server=$(snap mount base "$mnt" --json | grep -o '"server_pid":[0-9]*' | cut -d: -f2)
  kill -KILL "$server"
  gone "$server"
  server=$(snap mount base "$mnt" --json | grep -o '"server_pid":[0-9]*' | cut -d: -f2)
  [ -n "$server" ] || fail "mount over a dead one"
  user cmp "$mnt/memory.bin" "$image" || fail "read again"

  # A server that stood still while its mount was undone and made anew.
  kill -STOP "$server" || fail "the server is not there"
  user fusermount3 -u -z -- "$mnt" || fail "fusermount3 -u -z"
  snap mount base "$mnt" >/dev/null || fail "mount beside a server that stands still"
  kill -TERM "$server"
  kill -CONT "$server"
  gone "$server"
  user cmp "$mnt/memory.bin" "$image" || fail "an old server has undone the next mount"
  snap umount "$mnt" >/dev/null || fail "umount in the end"
done
