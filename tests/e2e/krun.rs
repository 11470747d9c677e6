//! Workers in libkrun microVMs, for real, wherever QEMU runs: its software emulation of AMD SVM
//! gives the machine that it emulates a `/dev/kvm`, on which the tool boots libkrun's own kernel.
//! Everything is some 20 times slower than on hardware.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use iii_engine::firmware::{Package, Places};
use iii_oci::Settings;
use tempfile::TempDir;

use crate::harness::{self, NODE_IMAGE, busybox_base, gcc, skip};
use crate::machine::{self, Vm};
use crate::vm;

/// How long everything may take, of which the emulated machine's own boot is 15 s, and a microVM 4
/// to 15 s.
const LIMIT: Duration = Duration::from_secs(600);

/// The guest kernel's library, fetched once as the tool does; says why where it cannot be.
fn libkrunfw() -> Result<PathBuf, String> {
    let places = Places {
        flag: None,
        variable: std::env::var_os("III_LIBKRUNFW").map(PathBuf::from),
        home: harness::cache().join("lib"),
        system: Vec::new(),
    };
    let settings = Settings::from_variables(&|name| std::env::var_os(name))
        .map_err(|error| error.to_string())?;
    let package = Package::of_this_machine();
    let library = places.find_or_fetch(package.as_ref(), &settings, &|_| ());
    library.map_err(|error| error.to_string())
}

/// The root filesystem of the machine: busybox, the tool, and all that it needs.
fn root(libkrunfw: &Path) -> TempDir {
    let dir = TempDir::with_prefix("kvm-host-").unwrap();
    let copied = Command::new("cp")
        .arg("-a")
        .arg(busybox_base().join("."))
        .arg(dir.path())
        .status();
    assert!(copied.unwrap().success());
    vm::install(Path::new(env!("CARGO_BIN_EXE_iii")), dir.path(), "iii");
    fs::create_dir(dir.path().join("base")).unwrap();
    let copied = Command::new("cp")
        .arg("-a")
        .arg(busybox_base().join("."))
        .arg(dir.path().join("base"))
        .status();
    assert!(copied.unwrap().success());
    fs::write(dir.path().join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    fs::write(dir.path().join("etc/resolv.conf"), "nameserver 127.0.0.1\n").unwrap();
    fs::copy(libkrunfw, dir.path().join("libkrunfw")).unwrap();
    gcc("-static", RESOLVER, &dir.path().join("bin/resolver"));
    gcc("-shared", SILENT, &dir.path().join("silent"));
    dir
}

/// A name server: every name has the address 10.9.8.7.
const RESOLVER: &str = r"
        #include <arpa/inet.h>
        #include <string.h>
        #include <sys/socket.h>
        int main(int argc, char **argv) {
            static unsigned char m[1024];
            static const unsigned char a[] = {0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 10, 9, 8, 7};
            struct sockaddr_in on = {AF_INET, htons(53)}, from;
            int s = socket(AF_INET, SOCK_DGRAM, 0);
            inet_aton(argv[1], &on.sin_addr);
            if (bind(s, (struct sockaddr *)&on, sizeof on)) return 1;
            for (;;) {
                socklen_t l = sizeof from;
                int n = recvfrom(s, m, 512, 0, (struct sockaddr *)&from, &l);
                if (n < 12) continue;
                m[2] = 0x81, m[3] = 0x80, m[7] = 1;
                memcpy(m + n, a, sizeof a);
                sendto(s, m, n + sizeof a, 0, (struct sockaddr *)&from, l);
            }
        }
";

/// In place of libkrunfw: a kernel whose first instruction is invalid, so that the virtual
/// machine shuts down.
const SILENT: &str = r"
        #include <stddef.h>
        #include <string.h>
        static char kernel[4 << 20] __attribute__((aligned(4096)));
        char *krunfw_get_kernel(size_t *load, size_t *entry, size_t *size) {
            for (size_t i = 0; i < sizeof kernel; i += 2) memcpy(kernel + i, (char[]){0x0f, 0x0b}, 2);
            *load = *entry = 0x1000000;
            *size = sizeof kernel;
            return kernel;
        }
        int krunfw_get_version(void) { return 5; }
";

/// Runs `job`, a shell script, on the machine. Returns what was on its console.
fn on_kvm(job: &str) -> Result<Vec<String>, String> {
    let libkrunfw = libkrunfw().map_err(|why| format!("libkrunfw: {why}"))?;
    let script = harness::repository("scripts/make-kvm-host");
    let made = machine::make(script.to_str().unwrap(), &harness::cache())?;
    let root = root(&libkrunfw);
    let mut qemu = Command::new("qemu-system-x86_64");
    // The cpu's features that are missing are those that TCG gives to a guest's guest and does not
    // emulate there.
    qemu.args("-accel tcg,thread=multi -cpu max,+svm,-pku,-cx16,-erms,-fsrm -smp 1 -m 1536".split(' '))
        .args("-M q35,smbus=off,sata=off,hpet=off -vga none".split(' '))
        .arg("-append")
        .arg("console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable random.trust_cpu=on audit=0 no_timer_check")
        .arg("-fsdev")
        .arg(format!(
            "local,id=root,path={},security_model=none,readonly=on,multidevs=remap",
            root.path().display()
        ))
        .args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
    let job = format!(
        r#"
            export HOME=/root NO_COLOR=1 III_GC=off III_LIBKRUNFW=/libkrunfw
            iii image import /base --as {NODE_IMAGE}
            # The probe gives a guest a second, which is enough on hardware.
            printf '{{"version":1,"boot":"%s","unusable":null}}' "$(cat /proc/sys/kernel/random/boot_id)" >/root/.iii/kvm.json
            mkdir -p /project && cd /project
            manifest() {{
                printf 'name: box\nruntime: {{kind: javascript}}\nresources: {{memory: 256, cpus: 8}}\n' >iii.worker.yaml
                printf 'env: {{GREETING: "good day"}}\n' >>iii.worker.yaml
                printf 'scripts:\n  setup: "%s"\n  install: "%s"\n  start: "%s"\n' "$@" >>iii.worker.yaml
            }}
            dev="iii worker dev . --name box --runtime libkrun --port 49000"
            # Runs it beside what follows.
            begin() {{ >/tmp/out; $dev "$@" >/tmp/out 2>/tmp/err & dev_pid=$!; }}
            # Says what went wrong where, since a shell that ends says nothing.
            expect() {{ "$@" || {{ echo "FAILED: $*"; cat /tmp/out /tmp/err /tmp/exec-err; cat /root/.iii/dev/box/console.log; exit 1; }}; }}
            # Waits until the worker says so.
            await() {{ n=0; until grep -q "$1" /tmp/out; do sleep 1; expect kill -0 $dev_pid; n=$((n + 1)); expect [ $n -lt 150 ]; done; }}
            # Debian's busybox has no pgrep.
            vms() {{ ps -o pid,args | awk '/__sandbox-vm/ && !/awk/ {{ print $1 }}'; }}
            {job}
        "#
    );
    Ok(Vm::emulate(qemu, &made, &job, LIMIT).finish())
}

const JOB: &str = r#"
# The engine's place is taken by whatever listens on loopback here.
mkdir /tmp/www && echo "from outside" >/tmp/www/hello
httpd -p 127.0.0.1:49000 -h /tmp/www

manifest 'echo s >/etc/setup; echo in setup' 'cat in >out; ls /nowhere || true' \
    'id -u; pwd; echo $GREETING; cat /etc/setup out; hostname; read line; echo read $line; [ $(nproc) = 1 ]; echo $III_ISOLATION; wget -qO- http://${III_URL#ws://}/hello; echo to stderr >/dev/stderr; date +%Y; [ ! -e /.iii/init ] || echo init; ls -A / | grep -c iii || exit 7'
echo given >in
code=0
echo typed | $dev >/tmp/out 2>/tmp/err || code=$?
expect [ $code = 7 ]
printf '0\n/workspace\ngood day\ns\ngiven\nbox\nread typed\nlibkrun\nfrom outside\n%s\ninit\n0\n' $(date +%Y) >/tmp/wanted
expect cmp /tmp/out /tmp/wanted
expect grep -q 'setup │ in setup' /tmp/err
expect grep -q 'install │ ls: /nowhere' /tmp/err
expect grep -q '^to stderr' /tmp/err
expect grep -q 'ended: exit code 7' /tmp/err
# Of the host's localhost there is the engine, and what is allowed.
mkdir /tmp/secret && echo "of the host" >/tmp/secret/hello
httpd -p 127.0.0.1:5432 -h /tmp/secret
httpd -p 127.0.0.1:5433 -h /tmp/secret
httpd -p 127.0.0.1:5434 -h /tmp/secret
resolver 127.0.0.1 & resolver 127.0.0.2 &
echo "PASSED first run"

printf 'network: {host_loopback: [5434]}\n' >/tmp/more
manifest 'echo s >/etc/setup; echo in setup' 'cat in >out; ls /nowhere || true' \
    'for p in 5432 5433 5434 49000; do wget -qO- http://127.0.0.1:$p/hello || echo none; done; wget -qO- http://[::1]:5432/hello || echo none; nslookup -type=a engine.test | grep -c 10.9.8.7; nslookup -type=a engine.test 127.0.0.2 | grep -c 10.9.8.7 || true; echo waiting; sleep 10000'
cat /tmp/more >>iii.worker.yaml
begin --allow-host-loopback 5433
await waiting
printf 'none\nof the host\nof the host\nfrom outside\nnone\n1\n0\nwaiting\n' >/tmp/wanted
expect cmp /tmp/out /tmp/wanted
expect grep -q 'localhost:5434 of this machine' /tmp/err
echo "PASSED network"

vm_pid=$(vms)
expect grep -q '^CapEff:.0000000000000000$' /proc/$vm_pid/status
expect grep -q '^Seccomp:.2$' /proc/$vm_pid/status
iii worker exec box -- find / -xdev -type f >/dev/null
# All but the guest's memory: the largest mapping, and its kernel, which is in the library.
awk '/^[0-9a-f]+-[0-9a-f]+ / { kernel = /libkrunfw/ } /^Size:/ { size = $2 } /^Pss:/ { if (kernel) guest += $2; else all += $2; if (!kernel && size > largest) { largest = size; pss = $2 } } END { print "MEMORY", all - pss, "KiB beside the guest, which has", guest + pss, "of", largest }' /proc/$vm_pid/smaps >/tmp/memory
cat /tmp/memory
expect [ $(cut -d' ' -f2 </tmp/memory) -lt $((40 * 1024)) ]
echo "PASSED confinement"
kill -INT $dev_pid
expect wait $dev_pid

# What install did not look at changes nothing for it; what the worker wrote stays.
manifest 'echo s >/etc/setup; echo in setup' 'cat in >out; ls /nowhere || true' \
    'echo kept >>kept; trap \"echo bye; exit 3\" INT; echo started $(cat edit); while :; do sleep 1; done'
echo once >edit
begin
await started
expect grep -q 'install  cached' /tmp/err
code=0
echo typed | iii worker exec box -e A=b -- sh -c 'cat; echo $A; pwd; echo to stderr >&2; exit 6' >/tmp/exec 2>/tmp/exec-err || code=$?
expect [ $code = 6 ]
printf 'typed\nb\n/workspace\n' >/tmp/wanted
expect cmp /tmp/exec /tmp/wanted
expect grep -q '^to stderr' /tmp/exec-err
code=0
iii worker exec box -- not-there 2>/tmp/exec-err || code=$?
expect [ $code = 127 ]
# Much of it, while others talk.
iii worker exec box -- sh -c 'cat /bin/busybox /bin/busybox' >/tmp/exec &
expect iii worker exec box -- true
expect wait $!
expect [ $(wc -c </tmp/exec) = $((2 * $(wc -c </bin/busybox))) ]
echo "PASSED exec"

# What only the process of the VM has cannot be frozen from here.
code=0
iii worker snapshot box 2>/tmp/exec-err || code=$?
expect [ $code = 1 ]
expect grep -q 'in a microVM, where no snapshot can be taken while it runs' /tmp/exec-err
expect grep -q 'stop it first' /tmp/exec-err
echo "PASSED snapshot"

# A machine takes the place of another when the project changes.
vm_pid=$(vms)
echo again >/root/edit && mv /root/edit edit
await 'started again'
expect grep -q 'reloaded: 1 file changed' /tmp/err
expect [ $(vms | wc -l) = 1 ]
expect [ $(vms) != $vm_pid ]
expect [ "$(iii worker exec box -- cat edit)" = again ]
echo "PASSED reload"
kill -INT $dev_pid
expect wait $dev_pid
expect grep -q bye /tmp/out
expect grep -q stopped /tmp/err
echo "PASSED interrupt"

# Nothing outlives the tool.
begin
await started
vm_pid=$(vms)
kill -KILL $dev_pid
wait $dev_pid || true
expect [ -n "$vm_pid" ]
for try in 1 2 3 4 5 6 7 8 9 10; do [ -n "$(vms)" ] || break; sleep 1; done
expect [ -z "$(vms)" ]
echo "PASSED kill"

manifest 'echo s >/etc/setup; echo in setup' 'cat in; echo first; exit 5' 'cat kept'
code=0
$dev >/tmp/out 2>/tmp/err || code=$?
expect grep -q 'install failed: exit code 5' /tmp/err
expect grep -q first /tmp/err
echo "PASSED failing step"

# More memory than there is is refused before anything is started, whatever else might be tried.
sed -i 's/memory: 256/memory: 1048576/' iii.worker.yaml
for runtime in libkrun auto; do
    code=0
    iii worker dev . --name box --runtime $runtime >/tmp/out 2>/tmp/err || code=$?
    expect [ $code = 1 ]
    expect grep -q 'error: /project/iii.worker.yaml: resources.memory: 1048576 MiB are more than' /tmp/err
done
echo "PASSED memory"

# A guest that says nothing, as its kernel is none. Layers are the same in namespaces.
manifest 'echo s >/etc/setup; echo in setup' 'cat in >out; ls /nowhere || true' 'echo $III_ISOLATION; cat kept'
export III_LIBKRUNFW=/silent
dev="iii worker dev . --name box --port 49000"
expect $dev >/tmp/out 2>/tmp/err
expect grep -q 'runtime libkrun: a microVM' /tmp/err
expect grep -q 'no microVM: .* did not start' /tmp/err
expect grep -q 'runtime namespace: ' /tmp/err
expect grep -q 'install  cached' /tmp/err
printf 'namespace\nkept\nkept\nkept\n' >/tmp/wanted
expect cmp /tmp/out /tmp/wanted
# From then on nobody tries it but who says so.
expect $dev >/tmp/out 2>/tmp/err
expect [ $(grep -c 'runtime namespace: ' /tmp/err) = 1 ]
expect [ $(grep -c 'no microVM' /tmp/err) = 0 ]
code=0
$dev --runtime libkrun >/tmp/out 2>/tmp/err || code=$?
expect [ $code = 1 ]
expect grep -q 'libkrun cannot run a microVM here' /tmp/err
echo "PASSED fallback"
"#;

#[test]
fn workers_run_in_microvms() {
    let result = on_kvm(JOB);
    match result {
        Ok(console) => {
            let memory = console.iter().find(|line| line.starts_with("MEMORY"));
            eprintln!(
                "the process of a microVM: {}",
                memory.map_or("", String::as_str)
            );
            for what in [
                "first run",
                "network",
                "confinement",
                "exec",
                "snapshot",
                "reload",
                "interrupt",
                "kill",
                "failing step",
                "memory",
                "fallback",
            ] {
                let passed = format!("PASSED {what}");
                assert!(console.contains(&passed), "{console:#?}");
            }
        }
        Err(why) => skip("microVMs", &why),
    }
}
