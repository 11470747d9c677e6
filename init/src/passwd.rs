//! The `User` of an image config, resolved against the image's own `/etc/passwd` and `/etc/group`.

/// The user of the command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory, absolute.
    pub home: Option<String>,
}

/// Resolves `user` as container engines do: a name wins over a number, an unknown number is taken
/// as it is with group 0, and a group named explicitly leaves no supplementary groups. `None` for a
/// name that is not there.
pub fn resolve(user: &str, passwd: &str, group: &str) -> Option<Identity> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse().ok();

    let accounts = || passwd.lines().filter_map(Account::parse);
    let account = accounts()
        .find(|account| account.name == user)
        .or_else(|| accounts().find(|account| Some(account.uid) == number));
    let mut identity = match &account {
        Some(account) => Identity {
            uid: account.uid,
            gid: account.gid,
            groups: Vec::new(),
            home: Some(account.home.to_owned()).filter(|home| home.starts_with('/')),
        },
        None => Identity {
            uid: number?,
            home: (number == Some(0)).then(|| "/root".to_owned()),
            ..Identity::default()
        },
    };

    let groups = || group.lines().filter_map(Group::parse);
    if let Some(wanted) = wanted_group {
        identity.gid = match groups().find(|group| group.name == wanted) {
            Some(group) => group.gid,
            None => wanted.parse().ok()?,
        };
    } else if let Some(account) = account {
        identity.groups = groups()
            .filter(|group| {
                group
                    .members
                    .split(',')
                    .any(|member| member == account.name)
            })
            .map(|group| group.gid)
            .take(MAX_GROUPS)
            .collect();
    }
    Some(identity)
}

/// The kernel's own bound on supplementary groups.
const MAX_GROUPS: usize = 65_536;

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        Some(Self {
            name: fields.next()?,
            uid: fields.nth(1)?.parse().ok()?,
            gid: fields.next()?.parse().ok()?,
            home: fields.nth(1)?,
        })
    }
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        Some(Self {
            name: fields.next()?,
            gid: fields.nth(1)?.parse().ok()?,
            members: fields.next()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n\
                      broken\n\
                      app:x:1000:1001:App:/home/app:/bin/sh\n\
                      1000:x:7:7::/seven:\n";
        let group = "root:x:0:\nwheel:x:10:app,other\naudio:x:29:other,app\nempty\n";
        let some = |uid, gid, groups: &[u32], home: &str| {
            Some(Identity {
                uid,
                gid,
                groups: groups.to_vec(),
                home: Some(home.to_owned()).filter(|home| !home.is_empty()),
            })
        };
        for (user, expected) in [
            ("", some(0, 0, &[], "/root")),
            ("0", some(0, 0, &[], "/root")),
            ("app", some(1000, 1001, &[10, 29], "/home/app")),
            ("app:wheel", some(1000, 10, &[], "/home/app")),
            ("app:77", some(1000, 77, &[], "/home/app")),
            ("app:", some(1000, 1001, &[10, 29], "/home/app")),
            ("1000", some(7, 7, &[], "/seven")),
            ("4242", some(4242, 0, &[], "")),
            ("4242:audio", some(4242, 29, &[], "")),
            (":wheel", some(0, 10, &[], "/root")),
            ("nobody-here", None),
            ("app:no-group", None),
            ("-1", None),
            ("4294967296", None),
        ] {
            assert_eq!(resolve(user, passwd, group), expected, "{user:?}");
        }
        assert_eq!(resolve("", "", ""), some(0, 0, &[], "/root"));
    }
}
