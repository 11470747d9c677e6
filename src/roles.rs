//! Roles of this program when it starts itself, chosen by the first argument. Users never need
//! them.

use std::env;
use std::io;
use std::process::exit;

use iii_engine::managed::supervisor;
use iii_sandbox as sandbox;
use iii_sandbox::kvm;

/// A part that a process of this program plays for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Makes the namespaces of a sandbox, and is its pid 1.
    #[cfg(target_os = "linux")]
    SandboxInit,
    /// Is a microVM.
    #[cfg(feature = "libkrun")]
    MicroVm,
    /// Runs a guest of one page on `/dev/kvm`.
    KvmProbe,
    /// Runs a managed worker.
    Supervisor,
}

impl Role {
    const ALL: &[(&str, Self)] = &[
        #[cfg(target_os = "linux")]
        (sandbox::INIT_MARKER, Self::SandboxInit),
        #[cfg(feature = "libkrun")]
        (sandbox::VM_MARKER, Self::MicroVm),
        (kvm::MARKER, Self::KvmProbe),
        (supervisor::MARKER, Self::Supervisor),
    ];

    /// The role that this process was started for, if it was.
    pub fn of_this_process() -> Option<Self> {
        let argument = env::args_os().nth(1)?;
        let role = Self::ALL.iter().find(|(marker, _)| argument == *marker);
        role.map(|(_, role)| *role)
    }

    /// Plays the role to its end. Only one thread runs yet.
    pub fn play(self, supervise: impl FnOnce() -> i32) -> ! {
        let code = match self {
            #[cfg(target_os = "linux")]
            Self::SandboxInit => sandbox::run_init(),
            #[cfg(feature = "libkrun")]
            Self::MicroVm => sandbox::run_vm(),
            Self::KvmProbe => {
                kvm::answer(io::stdout());
                Some(0)
            }
            Self::Supervisor => Some(supervise()),
        };
        exit(code.unwrap_or_else(|| {
            eprintln!("this is how iii starts its own sandboxes; it is not for people");
            2
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_role_has_a_word_of_its_own() {
        for (number, (word, role)) in Role::ALL.iter().enumerate() {
            assert!(word.starts_with("__"), "{word} could be a command");
            for (other, another) in &Role::ALL[..number] {
                assert!(other != word && another != role, "{word}");
            }
        }
    }
}
