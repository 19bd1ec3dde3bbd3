//! Dropping root: the user that a process started as root switches to.
//!
//! What only root can open is opened first: KVM, taps, userfaultfd, files. Then the whole process
//! becomes that user, for good. The C library changes the ids of every thread, which is why the
//! [filters](crate::confine) allow those calls; they gain nothing for a process that is not root.

use std::fs;
use std::path::Path;
use std::str::FromStr;

use nix::unistd::{
    Gid, Group, Uid, User as Account, getgrouplist, getgroups, getresgid, getresuid, setegid,
    seteuid, setgroups, setresgid, setresuid,
};
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, accessat, fchown, open};

use crate::error::{Result, VmmError};

/// A user to switch to: `NAME` or `UID`, optionally followed by a colon and `GROUP` or `GID`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The text that this was parsed from.
    spec: String,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl FromStr for User {
    type Err = String;

    /// Parses a user. Without a group, it gets the groups that this host's databases list for it.
    fn from_str(spec: &str) -> Result<Self, String> {
        let (user, group) = match spec.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (spec, None),
        };
        let account = match user.parse() {
            Ok(uid) => Account::from_uid(Uid::from_raw(uid)),
            Err(_) => Account::from_name(user),
        };
        let account = account.map_err(|error| format!("cannot look up user `{user}`: {error}"))?;
        let uid = match (&account, user.parse()) {
            (Some(account), _) => account.uid,
            (None, Ok(uid)) => Uid::from_raw(uid),
            (None, Err(_)) => return Err(format!("expected a user of this host, found `{user}`")),
        };
        if uid.is_root() {
            return Err("expected a user other than root".into());
        }
        let (gid, groups) = match (group, &account) {
            (Some(group), _) => {
                let gid = find_group(group)?;
                (gid, vec![gid])
            }
            (None, Some(account)) => (account.gid, groups_of(account)?),
            (None, None) => {
                return Err(format!(
                    "expected {user}:GID, since this host has no user {user} to take the group from"
                ));
            }
        };
        Ok(Self { spec: spec.to_owned(), uid, gid, groups })
    }
}

fn find_group(group: &str) -> Result<Gid, String> {
    if let Ok(gid) = group.parse() {
        return Ok(Gid::from_raw(gid));
    }
    let found = Group::from_name(group);
    let found = found.map_err(|error| format!("cannot look up group `{group}`: {error}"))?;
    Ok(found.ok_or_else(|| format!("expected a group of this host, found `{group}`"))?.gid)
}

fn groups_of(account: &Account) -> Result<Vec<Gid>, String> {
    let cannot = |error: &dyn std::fmt::Display| {
        format!("cannot list groups of `{}`: {error}", account.name)
    };
    let name = std::ffi::CString::new(account.name.as_str()).map_err(|error| cannot(&error))?;
    getgrouplist(&name, account.gid).map_err(|error| cannot(&error))
}

impl User {
    /// The text that this user was parsed from.
    #[must_use]
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// True if this process is that user already, for good.
    fn is_us(&self) -> Result<bool> {
        let ids = getresuid().and_then(|uids| Ok((uids, getresgid()?)));
        let (uids, gids) =
            ids.map_err(|error| self.failed("get this process's user and group ids", error))?;
        Ok([uids.real, uids.effective, uids.saved] == [self.uid; 3]
            && [gids.real, gids.effective, gids.saved] == [self.gid; 3])
    }

    fn check_root(&self) -> Result<()> {
        if Uid::effective().is_root() {
            return Ok(());
        }
        Err(VmmError::Config(format!(
            "user: expected to be started as root, to continue as `{}`, found user id {}: omit --user",
            self.spec,
            Uid::effective()
        )))
    }

    /// Runs `with` while this process has only this user's rights when it opens files.
    ///
    /// # Errors
    /// [`VmmError::Config`] if this process is neither root nor this user; [`VmmError::Host`] if
    /// its ids cannot be changed.
    pub fn act_as<T>(&self, with: impl FnOnce() -> T) -> Result<T> {
        if self.is_us()? {
            return Ok(with());
        }
        self.check_root()?;
        let (own_gid, own_groups) = (Gid::effective(), getgroups());
        let failed = |error| self.failed("act as this user", error);
        let own_groups = own_groups.map_err(failed)?;
        setgroups(&self.groups).map_err(failed)?;
        setegid(self.gid).map_err(failed)?;
        seteuid(self.uid).map_err(failed)?;
        let done = with();
        // In reverse order: only root may change the group ids.
        let back = seteuid(Uid::from_raw(0))
            .and_then(|()| setegid(own_gid))
            .and_then(|()| setgroups(&own_groups));
        back.map_err(|error| self.failed("become root again after acting as this user", error))?;
        Ok(done)
    }

    /// Switches the whole process to this user, for good.
    ///
    /// # Errors
    /// [`VmmError::Config`] if this process is neither root nor this user, or could become root
    /// again; [`VmmError::Host`] if its ids cannot be changed.
    pub fn settle(&self) -> Result<()> {
        if self.is_us()? {
            return Ok(());
        }
        self.check_root()?;
        frazil_snapstore::pager::keep_device();
        let failed = |error| self.failed("become this user", error);
        setgroups(&self.groups).map_err(failed)?;
        setresgid(self.gid, self.gid, self.gid).map_err(failed)?;
        setresuid(self.uid, self.uid, self.uid).map_err(failed)?;
        let root = Uid::from_raw(0);
        if setresuid(root, root, root).is_ok() || !self.is_us()? {
            return Err(VmmError::Config(format!(
                "user: expected to become `{}` for good, found that this process can still become root",
                self.spec
            )));
        }
        Ok(())
    }

    /// Creates `folder` and makes this user its owner, unless something is there already or this
    /// process is the user already.
    ///
    /// # Errors
    /// [`VmmError::Host`] if it cannot be created.
    pub fn make_folder(&self, folder: &Path) -> Result<()> {
        let failed = || VmmError::host(format!("create {} for `{}`", folder.display(), self.spec));
        if folder.symlink_metadata().is_ok() || self.is_us()? {
            return Ok(());
        }
        if let Some(above) = folder.parent() {
            fs::create_dir_all(above).map_err(failed())?;
        }
        fs::create_dir(folder).map_err(failed())?;
        // By descriptor, without following links: the name may have been replaced since.
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = open(folder, flags, Mode::empty()).map_err(|errno| failed()(errno.into()))?;
        let (uid, gid) = (rustix::fs::Uid::from_raw(self.uid.as_raw()), self.gid.as_raw());
        fchown(&made, Some(uid), Some(rustix::fs::Gid::from_raw(gid)))
            .map_err(|errno| failed()(errno.into()))
    }

    /// Fails unless this user can write to `folder` and its entries. Call this while
    /// [acting as](Self::act_as) the user.
    ///
    /// # Errors
    /// [`VmmError::Config`], which names what the user cannot write to.
    pub fn check_writable(&self, folder: &Path) -> Result<()> {
        let check = |path: &Path, access| {
            accessat(CWD, path, access, AtFlags::EACCESS).map_err(|errno| {
                VmmError::Config(format!(
                    "user: expected `{}` to have write access to {}, found: {errno}. Make that user its \
                     owner and open the way there (chown -R {} {}; chmod a+x on folders above it)",
                    self.spec,
                    path.display(),
                    self.spec,
                    folder.display()
                ))
            })
        };
        let both = Access::READ_OK | Access::WRITE_OK;
        check(folder, both | Access::EXEC_OK)?;
        let entries = fs::read_dir(folder);
        let entries = entries.map_err(VmmError::host(format!("read {}", folder.display())))?;
        for entry in entries.flatten() {
            let path = entry.path();
            check(&path, if path.is_dir() { both | Access::EXEC_OK } else { both })?;
        }
        Ok(())
    }

    fn failed(&self, what: &str, errno: nix::Error) -> VmmError {
        VmmError::host(format!("{what} (`{}`)", self.spec))(errno.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_named_in_all_the_usual_ways() {
        let user = |spec: &str| spec.parse::<User>();
        let ids = |spec: &str| user(spec).map(|user| (user.uid.as_raw(), user.gid.as_raw()));
        assert_eq!(ids("12345:54321"), Ok((12345, 54321)));
        assert_eq!(user("12345:54321").unwrap().groups, [Gid::from_raw(54321)]);
        let nobody = Account::from_name("nobody").unwrap().expect("every host has it");
        let (uid, gid) = (nobody.uid.as_raw(), nobody.gid.as_raw());
        for spec in ["nobody", &uid.to_string()] {
            assert_eq!(ids(spec), Ok((uid, gid)));
            assert!(user(spec).unwrap().groups.contains(&nobody.gid));
        }
        assert_eq!(ids("nobody:7"), Ok((uid, 7)));
        assert_eq!(ids("12345:root"), Ok((12345, 0)));
        for (spec, says) in [
            ("root", "other than root"),
            ("0:5", "other than root"),
            ("no such user", "a user of this host, found `no such user`"),
            ("12345", "expected 12345:GID"),
            ("nobody:no such group", "a group of this host"),
            ("", "a user of this host"),
            ("nobody:", "a group of this host"),
        ] {
            let error = user(spec).unwrap_err();
            assert!(error.contains(says), "{spec}: {error}");
        }
    }
}
