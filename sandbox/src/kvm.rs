//! Whether `/dev/kvm` can run a guest.
//!
//! That it is there, opens, and makes a virtual machine proves little: where the hardware's support
//! does not reach this machine, a kernel may interpret the guest, a thousand times slower, and give
//! up at an instruction that an ordinary kernel needs. So a guest is run: in 64-bit mode with
//! paging it counts, uses what a kernel uses early on, and says so at a port. Work that
//! takes milliseconds with hardware may take [`PATIENCE`]. It runs in a child process, which can be
//! killed whatever the kernel does with it.

use std::fmt;
use std::fs;
use std::io::{self, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::process;

/// The device that runs guests.
pub const DEVICE: &str = if cfg!(target_os = "macos") {
    "the Hypervisor framework"
} else {
    "/dev/kvm"
};
/// The entitlement that macOS demands for guests, as in `iii.entitlements`.
const ENTITLEMENT: &str = "com.apple.security.hypervisor";
/// The argument by which the program knows that it is to run the guest.
pub const MARKER: &str = "__kvm-probe";
/// How long the guest may take.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// Most bytes of what a child says, and of a file with an answer.
const MAX_ANSWER: u64 = 4096;
/// Changes with the probe, so that answers of another one do not count.
const VERSION: u32 = 1;

/// Why no guest can run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", content = "detail", rename_all = "kebab-case")]
pub enum Unusable {
    /// The device does not exist.
    Missing,
    /// It may not be opened.
    Forbidden,
    /// It is not what it should be.
    Broken(String),
    /// A guest does not get on within [`PATIENCE`].
    Slow,
    /// This program was built without virtual machines, or for a machine that it has none for.
    Unsupported,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => write!(f, "{DEVICE} does not exist"),
            Self::Forbidden if cfg!(target_os = "macos") => write!(
                f,
                "{DEVICE} is closed to this program, which is not signed with the entitlement {ENTITLEMENT}"
            ),
            Self::Forbidden => write!(f, "{DEVICE} may not be opened by this user"),
            Self::Broken(what) => write!(f, "{DEVICE} does not run a guest: {what}"),
            Self::Slow => write!(
                f,
                "{DEVICE} does not run a guest at speed: the hardware's support does not reach this machine"
            ),
            Self::Unsupported => {
                f.write_str("this build of iii has no virtual machines for this machine")
            }
        }
    }
}

impl Unusable {
    /// The remedy.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Missing if cfg!(target_os = "macos") => {
                "use a Mac that has it: `sysctl kern.hv_support` says 1"
            }
            Self::Forbidden if cfg!(target_os = "macos") => {
                "sign it: codesign --sign - --force --entitlements iii.entitlements $(which iii)"
            }
            Self::Missing => {
                "on hardware: enable virtualization in the firmware and `modprobe kvm_intel` or `kvm_amd`; in a virtual machine or container: have its host allow nested virtualization and pass the device on"
            }
            Self::Forbidden => {
                "add the user to the device's group: sudo usermod -aG kvm $USER, then log in again"
            }
            Self::Broken(_) | Self::Slow => {
                "enable nested virtualization on the host of this machine"
            }
            Self::Unsupported => "build it with the feature `libkrun`, on x86-64 or arm64",
        }
    }
}

/// An answer that was given before.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    version: u32,
    /// The boot that it holds for.
    boot: String,
    unusable: Option<Unusable>,
}

/// As [`usable_now`], but an answer of this boot that `cache` holds is taken. Permissions change
/// without a boot, so what may not be opened or is missing is asked for again each time, which
/// takes no time.
pub fn usable(cache: &Path) -> Result<(), Unusable> {
    guest::open()?;
    if let Some(remembered) = recall(cache)
        && remembered.version == VERSION
        && process::boot_id().as_ref() == Some(&remembered.boot)
    {
        return remembered.unusable.map_or(Ok(()), Err);
    }
    usable_now(cache)
}

/// Whether a guest can run, found out by running one, and written to `cache`.
pub fn usable_now(cache: &Path) -> Result<(), Unusable> {
    guest::open()?;
    let result = probe();
    // Permissions change without a boot.
    if result != Err(Unusable::Forbidden)
        && let Some(boot) = process::boot_id()
    {
        remember(cache, boot, result.clone().err());
    }
    result
}

/// Whether the device is there, and may be opened.
#[cfg(all(feature = "libkrun", target_os = "linux"))]
fn open_device() -> Result<(), Unusable> {
    let device = fs::File::options().read(true).write(true).open(DEVICE);
    device.map(drop).map_err(|error| cannot_open(&error))
}

/// Records for this boot that guests do not run: one was started and sent nothing.
pub fn distrust(cache: &Path, why: String) {
    if let Some(boot) = process::boot_id() {
        remember(cache, boot, Some(Unusable::Broken(why)));
    }
}

fn recall(cache: &Path) -> Option<Remembered> {
    let mut text = String::new();
    let file = fs::File::open(cache).ok()?;
    file.take(MAX_ANSWER).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// Where it cannot be written down, the next one asks again.
fn remember(cache: &Path, boot: String, unusable: Option<Unusable>) {
    let version = VERSION;
    let remembered = Remembered {
        version,
        boot,
        unusable,
    };
    let Some(dir) = cache.parent() else { return };
    let write = || {
        fs::create_dir_all(dir)?;
        let file = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer(&file, &remembered)?;
        file.persist(cache)?;
        Ok::<_, io::Error>(())
    };
    let _ = write();
}

#[cfg(any(all(feature = "libkrun", target_os = "linux"), test))]
fn cannot_open(error: &io::Error) -> Unusable {
    match error.kind() {
        io::ErrorKind::NotFound => Unusable::Missing,
        io::ErrorKind::PermissionDenied => Unusable::Forbidden,
        _ => Unusable::Broken(error.to_string()),
    }
}

/// Runs a guest. Takes a few milliseconds where that works, and [`PATIENCE`] at most. This program
/// must call [`answer`] when its first argument is [`MARKER`].
fn probe() -> Result<(), Unusable> {
    let broken = |error: io::Error| Unusable::Broken(error.to_string());
    let mut child = Command::new(process::this_program())
        .arg(MARKER)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(broken)?;
    let out = child.stdout.take();
    let (sender, receiver) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut said = String::new();
        if let Some(out) = out {
            let _ = out.take(MAX_ANSWER).read_to_string(&mut said);
        }
        let _ = sender.send(said);
    });
    let said = receiver.recv_timeout(PATIENCE);
    // It may be stuck in the kernel's loop, which ends with it.
    let _ = child.kill();
    let _ = child.wait();
    let _ = reader.join();
    match said {
        Err(_) => Err(Unusable::Slow),
        Ok(said) => serde_json::from_str(&said).unwrap_or_else(|_| {
            Err(Unusable::Broken(
                "the guest ended the program that ran it".into(),
            ))
        }),
    }
}

/// Runs the guest and writes the answer to `out`, the standard output of a process that was
/// started for that.
pub fn answer(out: impl io::Write) {
    let answer: Result<(), Unusable> = guest::run();
    // A process that has stopped listening has its answer: none.
    let _ = serde_json::to_writer(out, &answer);
}

#[cfg(all(feature = "libkrun", target_os = "linux", target_arch = "x86_64"))]
mod guest {
    //! A guest of one page of code.

    use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
    use kvm_ioctls::{Cap, Kvm, VcpuExit};
    use memmap2::MmapMut;

    use super::{Unusable, cannot_open};

    pub(super) use super::open_device as open;

    const MEMORY: usize = 2 << 20;
    const CODE: usize = 0x1000;
    /// PML4, its one PDPT, and its one page directory with a page of 2 MiB.
    const TABLES: [usize; 3] = [0x2000, 0x3000, 0x4000];
    /// Where the guest may read and write.
    const DATA: u32 = 0x5000;
    /// Where the guest says [`ANSWER`].
    const PORT: u8 = 0x10;
    const ANSWER: u8 = 42;
    /// How far it counts: two milliseconds for a processor, a tenth of a second for one that is
    /// emulated, and three to eight seconds where a kernel interprets the guest.
    const COUNT: u32 = 4_000_000;

    /// From Intel's manual, volume 3: CR0.{PE, MP, ET, NE, WP, AM, PG}, CR4.{PAE, OSFXSR,
    /// OSXMMEXCPT}, EFER.{LME, LMA}.
    const CR0: u64 = 0x8005_0033;
    const CR4: u64 = 0x620;
    const EFER: u64 = 0x500;

    /// Counts down, asks for CPUID, reads the time stamp, uses a vector register, reloads the page
    /// tables, reads and writes a model specific register, flushes a translation, moves a string,
    /// swaps atomically, answers.
    fn code() -> Vec<u8> {
        let data = DATA.to_le_bytes();
        let mut code = vec![0xb9]; // mov ecx, COUNT
        code.extend(COUNT.to_le_bytes());
        code.extend([0xff, 0xc9]); // dec ecx
        code.extend([0x75, 0xfc]); // jnz -4
        code.extend([0x31, 0xc0, 0x0f, 0xa2]); // xor eax, eax; cpuid
        code.extend([0x0f, 0x31]); // rdtsc
        code.extend([0x0f, 0x10, 0x04, 0x25]); // movups xmm0, [DATA]
        code.extend(data);
        code.extend([0x0f, 0x11, 0x04, 0x25]); // movups [DATA], xmm0
        code.extend(data);
        code.extend([0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]); // mov rax, cr3; mov cr3, rax
        code.extend([0xb9, 0x80, 0x00, 0x00, 0xc0]); // mov ecx, EFER
        code.extend([0x0f, 0x32, 0x0f, 0x30]); // rdmsr; wrmsr
        code.extend([0x0f, 0x01, 0x3c, 0x25]); // invlpg [DATA]
        code.extend(data);
        code.push(0xbf); // mov edi, DATA
        code.extend(data);
        code.extend([0xb9, 0x40, 0x00, 0x00, 0x00, 0xf3, 0xaa]); // mov ecx, 64; rep stosb
        code.extend([0xf0, 0x0f, 0xb1, 0x0c, 0x25]); // lock cmpxchg [DATA], ecx
        code.extend(data);
        code.extend([0xb0, ANSWER, 0xe6, PORT]); // mov al, ANSWER; out PORT, al
        code.push(0xf4); // hlt
        code
    }

    pub fn run() -> Result<(), Unusable> {
        let kvm = Kvm::new().map_err(|error| cannot_open(&error.into()))?;
        let broken = |what: &'static str| {
            move |error: kvm_ioctls::Error| Unusable::Broken(format!("{what}: {error}"))
        };
        if kvm.get_api_version() != 12 {
            return Err(Unusable::Broken(
                "it is not version 12 of the interface".into(),
            ));
        }
        for (capability, name) in [
            (Cap::UserMemory, "guest memory"),
            (Cap::Irqchip, "an interrupt controller"),
            (Cap::Irqfd, "interrupts by event"),
            (Cap::Ioeventfd, "events by port"),
            (Cap::ImmediateExit, "immediate exits"),
        ] {
            if !kvm.check_extension(capability) {
                return Err(Unusable::Broken(format!("it has no {name}")));
            }
        }
        let vm = kvm.create_vm().map_err(broken("making a machine failed"))?;
        let mut memory = MmapMut::map_anon(MEMORY)
            .map_err(|error| Unusable::Broken(format!("no memory: {error}")))?;
        let [top, middle, bottom] = TABLES;
        let present = 0b11;
        let large = present | 0x80;
        let code = code();
        for (at, bytes) in [
            (top, &(middle as u64 | present).to_le_bytes()[..]),
            (middle, &(bottom as u64 | present).to_le_bytes()),
            (bottom, &large.to_le_bytes()),
            (CODE, &code),
        ] {
            if let Some(place) = memory.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        }
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.as_ptr() as u64,
        };
        // SAFETY: the mapping is as large as said, outlives the machine, and is not looked at while
        // the guest runs.
        unsafe { vm.set_user_memory_region(region) }.map_err(broken("giving it memory failed"))?;
        let mut cpu = vm
            .create_vcpu(0)
            .map_err(broken("making a processor failed"))?;
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .and_then(|cpuid| cpu.set_cpuid2(&cpuid))
            .map_err(broken("telling it its features failed"))?;
        let registers = broken("setting its registers failed");
        let mut special = cpu.get_sregs().map_err(registers)?;
        (special.cr0, special.cr3, special.cr4) = (CR0, top as u64, CR4);
        special.efer = EFER;
        let code_segment = kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_: 11,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..kvm_segment::default()
        };
        let data_segment = kvm_segment {
            selector: 16,
            type_: 3,
            l: 0,
            db: 1,
            ..code_segment
        };
        special.cs = code_segment;
        for segment in [
            &mut special.ds,
            &mut special.es,
            &mut special.ss,
            &mut special.fs,
            &mut special.gs,
        ] {
            *segment = data_segment;
        }
        let registers = broken("setting its registers failed");
        cpu.set_sregs(&special)
            .and_then(|()| cpu.get_regs())
            .and_then(|mut general| {
                general.rip = CODE as u64;
                general.rflags = 2;
                cpu.set_regs(&general)
            })
            .map_err(registers)?;
        match cpu.run().map_err(broken("running it failed"))? {
            VcpuExit::IoOut(port, [ANSWER]) if port == u16::from(PORT) => Ok(()),
            other => Err(Unusable::Broken(format!("it ended with {other:?}"))),
        }
    }
}

#[cfg(all(feature = "libkrun", target_os = "linux", target_arch = "aarch64"))]
mod guest {
    //! On arm64 no hypervisor interprets guests, so that a processor can be made says enough.
    //! Compiled, and not run.

    use kvm_ioctls::Kvm;

    use super::{Unusable, cannot_open};

    pub(super) use super::open_device as open;

    pub fn run() -> Result<(), Unusable> {
        let kvm = Kvm::new().map_err(|error| cannot_open(&error.into()))?;
        kvm.create_vm()
            .and_then(|vm| vm.create_vcpu(0))
            .map(drop)
            .map_err(|error| Unusable::Broken(format!("making a machine failed: {error}")))
    }
}

#[cfg(all(feature = "libkrun", target_os = "macos", target_arch = "aarch64"))]
mod guest {
    //! That the system lets this program have a machine says enough: there is hardware behind it,
    //! or none. Compiled, and not run.

    use std::ptr;

    use super::Unusable;

    /// `hv_error.h`: the entitlement is missing.
    const HV_DENIED: i32 = 0xfae9_4007_u32 as i32;

    #[link(name = "Hypervisor", kind = "framework")]
    unsafe extern "C" {
        fn hv_vm_create(config: *mut libc::c_void) -> i32;
    }

    /// Whether this Mac has the framework.
    pub fn open() -> Result<(), Unusable> {
        let (mut has, mut length) = (0_i32, size_of::<i32>());
        let name = c"kern.hv_support".as_ptr();
        // SAFETY: the name ends with a NUL, and the call writes no more than the length it is
        // given.
        let done = unsafe {
            let to = (&raw mut has).cast();
            libc::sysctlbyname(name, to, &raw mut length, ptr::null_mut(), 0)
        };
        if done == 0 && has == 1 {
            Ok(())
        } else {
            Err(Unusable::Missing)
        }
    }

    /// Makes this process's machine, which goes with the process.
    pub fn run() -> Result<(), Unusable> {
        // SAFETY: no configuration asks for the usual one.
        match unsafe { hv_vm_create(ptr::null_mut()) } {
            0 => Ok(()),
            HV_DENIED => Err(Unusable::Forbidden),
            error => Err(Unusable::Broken(format!(
                "making a machine failed: {error:#x}"
            ))),
        }
    }
}

#[cfg(not(all(
    feature = "libkrun",
    any(
        all(
            target_os = "linux",
            any(target_arch = "x86_64", target_arch = "aarch64")
        ),
        all(target_os = "macos", target_arch = "aarch64")
    )
)))]
mod guest {
    use super::Unusable;

    pub fn open() -> Result<(), Unusable> {
        Err(Unusable::Unsupported)
    }

    pub fn run() -> Result<(), Unusable> {
        Err(Unusable::Unsupported)
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn an_answer_holds_for_its_boot_and_its_probe() {
        let dir = TempDir::new().unwrap();
        let cache = dir.path().join("run/kvm.json");
        assert_eq!(recall(&cache), None);
        remember(&cache, "boot".into(), Some(Unusable::Slow));
        let remembered = Remembered {
            version: VERSION,
            boot: "boot".into(),
            unusable: Some(Unusable::Slow),
        };
        assert_eq!(recall(&cache), Some(remembered));
        for text in ["", "{", "{\"version\":1}", "null"] {
            fs::write(&cache, text).unwrap();
            assert_eq!(recall(&cache), None);
        }
    }

    #[test]
    fn answers_of_the_child_survive_the_way() {
        for answer in [
            Ok(()),
            Err(Unusable::Slow),
            Err(Unusable::Broken("it ended with Hlt".into())),
        ] {
            let text = serde_json::to_string(&answer).unwrap();
            let parsed: Result<(), Unusable> = serde_json::from_str(&text).unwrap();
            assert_eq!(parsed, answer);
        }
    }

    #[test]
    fn what_cannot_be_opened_says_why() {
        let of = |kind: io::ErrorKind| cannot_open(&kind.into());
        assert_eq!(of(io::ErrorKind::NotFound), Unusable::Missing);
        assert_eq!(of(io::ErrorKind::PermissionDenied), Unusable::Forbidden);
        assert!(matches!(of(io::ErrorKind::Other), Unusable::Broken(_)));
    }
}
