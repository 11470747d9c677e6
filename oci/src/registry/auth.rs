//! Credentials of docker and podman, and challenges of registries.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use super::RegistryError;

/// Longest file of credentials, and longest answer of a helper, in bytes.
const MAX_AUTH_FILE: u64 = 4 << 20;
const MAX_HELPER_ANSWER: u64 = 64 << 10;
/// How long a credential helper may take: it may ask a person for a passphrase.
const HELPER_TIME: Duration = Duration::from_secs(60);
/// Between two looks at whether a helper that has answered has ended.
const HELPER_POLL: Duration = Duration::from_millis(5);
/// User name in a credential helper whose secret is an identity token.
const TOKEN_USER: &str = "<token>";

/// A credential.
#[derive(PartialEq, Eq)]
pub enum Credentials {
    /// A name and a password.
    Password(String, String),
    /// An identity token, for which tokens are issued.
    Identity(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

impl Credentials {
    /// The header of basic authentication.
    pub fn basic(&self) -> Option<String> {
        match self {
            Self::Password(user, password) => {
                let encoded = STANDARD.encode(format!("{user}:{password}"));
                Some(format!("Basic {encoded}"))
            }
            Self::Identity(_) => None,
        }
    }
}

/// The files that may have credentials, the first to be asked first. They are read when a registry
/// asks who we are.
#[derive(Debug, Clone, Default)]
pub struct AuthFiles(pub Vec<PathBuf>);

#[derive(serde::Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    auths: HashMap<String, Entry>,
    cred_helpers: HashMap<String, String>,
    creds_store: String,
}

#[derive(serde::Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// The values of environment variables, `HOME` among them.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl AuthFiles {
    /// podman's `$REGISTRY_AUTH_FILE`, or else its other files and then docker's.
    pub fn from_variables(variables: Variables<'_>) -> Self {
        let dir = |name| {
            variables(name)
                .map(PathBuf::from)
                .filter(|dir| dir.is_absolute())
        };
        if let Some(file) = dir("REGISTRY_AUTH_FILE") {
            return Self(vec![file]);
        }
        let home = dir("HOME");
        let below_home = |path| home.as_ref().map(|home| home.join(path));
        let config = dir("XDG_CONFIG_HOME").or_else(|| below_home(".config"));
        let docker = dir("DOCKER_CONFIG").or_else(|| below_home(".docker"));
        let containers = "containers/auth.json";
        let files = [
            dir("XDG_RUNTIME_DIR").map(|dir| dir.join(containers)),
            config.map(|dir| dir.join(containers)),
            docker.map(|dir| dir.join("config.json")),
        ];
        Self(files.into_iter().flatten().collect())
    }

    /// The credentials for a repository of a registry that goes by the names `hosts`.
    pub fn find(
        &self,
        hosts: &[String],
        repository: &str,
    ) -> Result<Option<Credentials>, RegistryError> {
        for path in &self.0 {
            if let Some(file) = read(path)?
                && let Some(credentials) = file.find(hosts, repository)?
            {
                return Ok(Some(credentials));
            }
        }
        Ok(None)
    }
}

fn read(path: &Path) -> Result<Option<AuthFile>, RegistryError> {
    let failed = |source| RegistryError::AuthFile {
        path: path.to_owned(),
        source,
    };
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    let mut text = Vec::new();
    file.take(MAX_AUTH_FILE)
        .read_to_end(&mut text)
        .map_err(failed)?;
    let parsed = serde_json::from_slice(&text).map_err(|_| RegistryError::AuthSyntax {
        path: path.to_owned(),
    })?;
    Ok(Some(parsed))
}

impl AuthFile {
    fn find(
        &self,
        hosts: &[String],
        repository: &str,
    ) -> Result<Option<Credentials>, RegistryError> {
        for host in hosts {
            let helper = self.cred_helpers.iter().find(|(key, _)| bare(key) == *host);
            if let Some((key, helper)) = helper
                && let Some(found) = ask_helper(helper, key)?
            {
                return Ok(Some(found));
            }
        }
        // podman may have credentials for a part of a registry; the most exact ones count.
        let mut path = Some(repository);
        while let Some(part) = path {
            let found = hosts
                .iter()
                .find_map(|host| self.entry(&format!("{host}/{part}")));
            if found.is_some() {
                return Ok(found);
            }
            path = part.rsplit_once('/').map(|(front, _)| front);
        }
        if let Some(found) = hosts.iter().find_map(|host| self.entry(host)) {
            return Ok(Some(found));
        }
        if !self.creds_store.is_empty() {
            for host in hosts {
                let key = match host.as_str() {
                    "docker.io" => "https://index.docker.io/v1/",
                    host => host,
                };
                if let Some(found) = ask_helper(&self.creds_store, key)? {
                    return Ok(Some(found));
                }
            }
        }
        Ok(None)
    }

    fn entry(&self, name: &str) -> Option<Credentials> {
        let (_, entry) = self.auths.iter().find(|(key, _)| bare(key) == name)?;
        entry.credentials()
    }
}

impl Entry {
    fn credentials(&self) -> Option<Credentials> {
        if !self.identitytoken.is_empty() {
            return Some(Credentials::Identity(self.identitytoken.clone()));
        }
        if !self.username.is_empty() {
            let (user, password) = (self.username.clone(), self.password.clone());
            return Some(Credentials::Password(user, password));
        }
        let text = self.auth.trim();
        let decoded = STANDARD
            .decode(text)
            .or_else(|_| STANDARD_NO_PAD.decode(text));
        let decoded = String::from_utf8(decoded.ok()?).ok()?;
        let (user, password) = decoded.trim_end_matches('\0').split_once(':')?;
        (!user.is_empty()).then(|| Credentials::Password(user.to_owned(), password.to_owned()))
    }
}

/// The name that a key of an auth file stands for: docker writes `https://index.docker.io/v1/`.
fn bare(key: &str) -> &str {
    let key = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    let key = key.trim_end_matches('/');
    key.strip_suffix("/v1")
        .or_else(|| key.strip_suffix("/v2"))
        .unwrap_or(key)
}

/// Asks `docker-credential-NAME`, the user's own program, what it has for `host`.
fn ask_helper(name: &str, host: &str) -> Result<Option<Credentials>, RegistryError> {
    let program = format!("docker-credential-{name}");
    let asked = if name.contains('/') {
        Err(io::ErrorKind::InvalidInput.into())
    } else {
        ask_program(program.as_ref(), host, HELPER_TIME)
    };
    asked.map_err(|source| RegistryError::Helper { program, source })
}

fn ask_program(program: &OsStr, host: &str, limit: Duration) -> io::Result<Option<Credentials>> {
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let answer = converse(&mut child, host, limit);
    if answer.is_err() {
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
    let Some(answer) = answer? else {
        return Ok(None);
    };
    let unusable = |_| io::Error::new(io::ErrorKind::InvalidData, "its answer is no login");
    let answer: HelperAnswer = serde_json::from_slice(&answer).map_err(unusable)?;
    Ok(Some(if answer.username == TOKEN_USER {
        Credentials::Identity(answer.secret)
    } else {
        Credentials::Password(answer.username, answer.secret)
    }))
}

/// A helper's answer for `host`. A helper without one fails.
fn converse(child: &mut Child, host: &str, limit: Duration) -> io::Result<Option<Vec<u8>>> {
    let deadline = Instant::now() + limit;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read it still answers.
        let _ = writeln!(stdin, "{host}");
    }
    let (sender, answers) = channel();
    if let Some(stdout) = child.stdout.take() {
        // Ends with whatever has the other end of the pipe, which need not be the helper.
        thread::Builder::new().spawn(move || {
            let mut answer = Vec::new();
            let read = stdout.take(MAX_HELPER_ANSWER).read_to_end(&mut answer);
            let _ = sender.send(read.map(|_| answer));
        })?;
    }
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    let answer = answers.recv_timeout(limit).map_err(|_| late())??;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success().then_some(answer));
        }
        if Instant::now() >= deadline {
            return Err(late());
        }
        thread::sleep(HELPER_POLL);
    }
}

/// How a registry wants to be asked.
#[derive(Debug, PartialEq, Eq)]
pub enum Challenge {
    /// With a name and a password.
    Basic,
    /// With a token.
    Bearer(Bearer),
}

/// Where tokens are to be had.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Bearer {
    pub realm: String,
    pub service: Option<String>,
}

impl Challenge {
    /// The best of the challenges in a `WWW-Authenticate` header that is understood here.
    pub fn parse(header: &str) -> Option<Self> {
        let mut best = None;
        let mut rest = header.trim_start();
        while !rest.is_empty() {
            let (scheme, after) = word(rest);
            if scheme.is_empty() {
                return best;
            }
            rest = after.trim_start();
            let mut bearer = Bearer::default();
            while let Some((name, value, after)) = parameter(rest) {
                match name.to_ascii_lowercase().as_str() {
                    "realm" => bearer.realm = value,
                    "service" => bearer.service = Some(value),
                    _ => {}
                }
                rest = after.trim_start().trim_start_matches(',').trim_start();
            }
            rest = rest.trim_start_matches(',').trim_start();
            if scheme.eq_ignore_ascii_case("bearer") && !bearer.realm.is_empty() {
                return Some(Self::Bearer(bearer));
            }
            if scheme.eq_ignore_ascii_case("basic") {
                best = Some(Self::Basic);
            }
        }
        best
    }
}

fn word(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_alphanumeric() && !"-_.!~".contains(c))
        .unwrap_or(text.len());
    text.split_at(end)
}

/// `name=value` or `name="value"` at the beginning, and what comes after it.
fn parameter(text: &str) -> Option<(&str, String, &str)> {
    let (name, after) = word(text);
    let after = after.trim_start().strip_prefix('=')?.trim_start();
    if name.is_empty() {
        return None;
    }
    let Some(quoted) = after.strip_prefix('"') else {
        let end = after.find([',', ' ']).unwrap_or(after.len());
        let (value, rest) = after.split_at(end);
        return Some((name, value.to_owned(), rest));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((name, value, quoted.get(at + 1..)?)),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_is_heard_within_bounds() {
        let Ok(dir) = tempfile::tempdir() else {
            panic!("a temporary directory");
        };
        let password = || Credentials::Password("user".into(), "secret".into());
        let login = r#"{"ServerURL":"x","Username":"user","Secret":"secret"}"#;
        let token = r#"{"Username":"<token>","Secret":"id"}"#;
        for (script, expected) in [
            (format!("echo '{login}'"), Ok(Some(password()))),
            (
                format!("read host; test $1 $host = get the.host && echo '{login}'"),
                Ok(None),
            ),
            (
                format!("read host; test $1-$host = get-the.host && echo '{login}'"),
                Ok(Some(password())),
            ),
            (
                format!("echo '{token}'"),
                Ok(Some(Credentials::Identity("id".into()))),
            ),
            ("echo credentials not found; exit 1".into(), Ok(None)),
            ("echo garbage".into(), Err(io::ErrorKind::InvalidData)),
            ("exit 0".into(), Err(io::ErrorKind::InvalidData)),
            (
                r#"echo '{"Username":"user"}'"#.into(),
                Err(io::ErrorKind::InvalidData),
            ),
            ("yes".into(), Ok(None)),
            ("exec sleep 1000".into(), Err(io::ErrorKind::TimedOut)),
            // It leaves the pipe to another process.
            ("sleep 3 & exit 0".into(), Err(io::ErrorKind::TimedOut)),
            // It has said all, and does not end.
            (
                format!("echo '{login}'; exec >&-; exec sleep 1000"),
                Err(io::ErrorKind::TimedOut),
            ),
        ] {
            let program = dir.path().join("helper");
            // By a process of its own: a file that this one writes may be open in a child of
            // another test, and not run.
            let written = Command::new("sh")
                .args([
                    "-c",
                    r#"printf '#!/bin/sh\n%s\n' "$1" >"$0" && chmod 755 "$0""#,
                ])
                .args([program.as_os_str(), script.as_ref()])
                .status();
            assert!(written.is_ok_and(|status| status.success()));
            // Long enough for a shell on a busy machine, where it is to answer.
            let is_late = matches!(expected, Err(io::ErrorKind::TimedOut));
            let limit = Duration::from_millis(if is_late { 300 } else { 20_000 });
            let start = Instant::now();
            let answer = ask_program(program.as_ref(), "the.host", limit);
            assert_eq!(answer.map_err(|error| error.kind()), expected, "{script}");
            assert!(start.elapsed() < Duration::from_secs(15), "{script}");
        }
        let missing = ask_program(dir.path().as_os_str(), "x", HELPER_TIME);
        assert!(missing.is_err());
    }
}
