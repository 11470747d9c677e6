//! The environment of commands in a sandbox: pure.
//!
//! Setup and install get the image's variables and the defaults below; nothing of the worker's own,
//! which may be secret and would have to be part of the key. The worker gets all that and its own.

use std::collections::BTreeMap;

use crate::project::{FIRST_EPOCH, RESERVED_ENV};

/// First directories of every `PATH`.
const PATH_FIRST: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];
/// Last directories of `PATH`, after the image's own.
const PATH_LAST: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Variables by name.
pub type Env = BTreeMap<String, String>;

/// The environment of setup and install. `image` is an image's `Env`, as `NAME=value`; `tools` are
/// defaults for the project's tools, which the image's own values go before.
pub fn for_steps(image: &[String], tools: &[(&str, &str)]) -> Env {
    let mut env: Env = [("LANG", "C.UTF-8"), ("DEBIAN_FRONTEND", "noninteractive")]
        .iter()
        .chain(tools)
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    env.extend(image.iter().filter_map(|line| {
        let (name, value) = line.split_once('=')?;
        (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
    }));
    let path = path(env.get("PATH").map_or("", String::as_str));
    env.insert("PATH".into(), path);
    env
}

/// The environment that the worker has wherever it runs: that of the steps, then its own, the last
/// of a name before others. The tool's own variables are not in it.
pub fn anywhere<'a>(steps: &Env, own: impl Iterator<Item = (&'a String, &'a String)>) -> Env {
    let mut env = steps.clone();
    // Meant for apt while it builds; a worker would be surprised to inherit it.
    env.remove("DEBIAN_FRONTEND");
    // Meant for what install compiles.
    if env.get("SOURCE_DATE_EPOCH").map(String::as_str) == Some(FIRST_EPOCH) {
        env.remove("SOURCE_DATE_EPOCH");
    }
    env.extend(
        own.filter(|(name, _)| !RESERVED_ENV.contains(&name.as_str()))
            .map(|(name, value)| (name.clone(), value.clone())),
    );
    env
}

/// Words of a variable's name that say that its value is a secret.
const SECRET_WORDS: [&str; 17] = [
    "TOKEN",
    "TOKENS",
    "KEY",
    "KEYS",
    "PASS",
    "PASSPHRASE",
    "PWD",
    "AUTH",
    "PRIVATE",
    "CREDS",
    "COOKIE",
    "JWT",
    "BEARER",
    "PAT",
    "DSN",
    "SALT",
    "SIGNATURE",
];
/// The same, however they are joined to others.
const SECRET_PARTS: [&str; 8] = [
    "PASSWORD",
    "PASSWD",
    "SECRET",
    "CREDENTIAL",
    "APIKEY",
    "ACCESSKEY",
    "PRIVATEKEY",
    "ACCESSTOKEN",
];

/// Whether a variable looks like a secret: by a word of its name, or by its value, a URL with a
/// password or a private key. A guess that would rather take too much for a secret.
pub fn looks_secret(name: &str, value: &str) -> bool {
    let name = name.to_ascii_uppercase();
    let word = |word| SECRET_WORDS.contains(&word);
    name.split(|c: char| !c.is_ascii_alphanumeric()).any(word)
        || SECRET_PARTS.iter().any(|part| name.contains(part))
        || value.split("://").skip(1).any(has_password)
        || (value.contains("-----BEGIN") && value.contains("PRIVATE KEY"))
}

/// Whether the part of a URL behind its scheme begins with a user and a password.
fn has_password(rest: &str) -> bool {
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let user = authority.rsplit_once('@').map(|(user, _)| user);
    let password = user.and_then(|user| user.split_once(':'));
    password.is_some_and(|(_, password)| !password.is_empty())
}

/// The environment of the worker: that of the steps, then the manifest's, then config.yaml's, then
/// the tool's own.
pub fn for_worker(
    steps: &Env,
    manifest: &Env,
    config: &Env,
    name: &str,
    engine: &str,
    isolation: &str,
) -> Env {
    let mut env = anywhere(steps, manifest.iter().chain(config));
    for (key, value) in [
        ("III_URL", engine),
        ("III_ENGINE_URL", engine),
        ("III_WORKER_NAME", name),
        ("III_ISOLATION", isolation),
    ] {
        env.insert(key.into(), value.into());
    }
    env
}

fn path(image: &str) -> String {
    let mut dirs: Vec<&str> = Vec::new();
    for dir in PATH_FIRST
        .into_iter()
        .chain(image.split(':'))
        .chain(PATH_LAST)
    {
        if !dir.is_empty() && !dirs.contains(&dir) {
            dirs.push(dir);
        }
    }
    dirs.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_begins_as_promised_and_keeps_the_images() {
        for (image, expected) in [
            (
                "",
                "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
            ),
            (
                "/usr/local/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "/usr/local/bin:/usr/bin:/bin:/usr/local/cargo/bin:/usr/local/sbin:/usr/sbin:/sbin",
            ),
        ] {
            assert_eq!(path(image), expected);
        }
    }

    #[test]
    fn what_looks_secret() {
        for (name, value, secret) in [
            ("API_TOKEN", "x", true),
            ("api_key", "x", true),
            ("apiKey", "x", true),
            ("DBPASSWORD", "x", true),
            ("MY_SECRET_THING", "x", true),
            ("AWS_ACCESS_KEY_ID", "x", true),
            ("GOOGLE_CREDENTIALS", "x", true),
            ("X-AUTH", "x", true),
            ("AUTHOR", "x", false),
            ("KEYBOARD", "x", false),
            ("MONKEY", "x", false),
            ("TOKENIZERS_PARALLELISM", "false", false),
            ("COMPASS", "n", false),
            ("PATH", "/bin", false),
            ("URL", "https://host/x", false),
            ("URL", "https://user@host/x", false),
            ("URL", "https://user:@host/x", false),
            ("URL", "https://host/x:y@z", false),
            ("URL", "postgres://u:p@host/db", true),
            ("URL", "redis://:p@ss@host", true),
            ("URLS", "http://a/,amqp://u:p@b", true),
            ("PEM", "-----BEGIN RSA PRIVATE KEY-----", true),
        ] {
            assert_eq!(looks_secret(name, value), secret, "{name}={value}");
        }
    }

    #[test]
    fn who_wins() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let steps = for_steps(
            &[
                "A=image".into(),
                "LANG=de".into(),
                "=x".into(),
                "bad".into(),
            ],
            &[("A", "tool"), ("T", "tool")],
        );
        assert_eq!(
            (&*steps["A"], &*steps["T"], &*steps["LANG"]),
            ("image", "tool", "de")
        );
        let manifest = Env::from([
            pair("A", "manifest"),
            pair("B", "manifest"),
            pair("III_URL", "ws://evil"),
        ]);
        let config = Env::from([pair("B", "config")]);
        let env = for_worker(
            &steps,
            &manifest,
            &config,
            "w",
            "ws://localhost:1",
            "namespace",
        );
        assert_eq!((&*env["A"], &*env["B"]), ("manifest", "config"));
        assert_eq!(
            (&*env["III_URL"], &*env["III_ENGINE_URL"]),
            ("ws://localhost:1", "ws://localhost:1")
        );
        assert!(!env.contains_key("DEBIAN_FRONTEND"));
    }
}
