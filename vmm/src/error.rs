//! The errors of this crate, worded so that a person can act on them.

use frazil_snapstore::StoreError;
use frazil_snapstore::pager::PagerError;

/// Every error this crate returns.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// KVM is not usable at all.
    #[error("cannot use KVM: {found}; {advice}")]
    NoKvm {
        /// What was found instead.
        found: String,
        /// What to do.
        advice: &'static str,
    },
    /// A KVM call failed.
    #[error("KVM refused to {op}: {source}")]
    Kvm {
        /// What was tried, as a verb.
        op: &'static str,
        /// KVM's own error.
        source: kvm_ioctls::Error,
    },
    /// The host refused something other than a KVM call.
    #[error("cannot {op}: {source}")]
    Host {
        /// What was tried, as a verb.
        op: String,
        /// The system's own error.
        #[source]
        source: std::io::Error,
    },
    /// The configuration asks for something impossible.
    #[error("{0}")]
    Config(String),
    /// The kernel, initrd or command line cannot be loaded.
    #[error("cannot boot {what}: expected {expected}, found {found}")]
    Boot {
        /// The file or part.
        what: String,
        /// What can be booted.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Saved state does not fit this program or this host.
    #[error("state chunk `{chunk}`: expected {expected}, found {found}")]
    State {
        /// The chunk's name.
        chunk: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The pager failed.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// The machine cannot do that in its present state.
    #[error("{0}")]
    NotNow(String),
    /// No machine of this name is running, or not any more.
    #[error("no running VM `{name}`: {found}; `frazil ps` lists running VMs")]
    NoSuchVm {
        /// The name as given.
        name: String,
        /// What was found instead.
        found: String,
    },
}

impl VmmError {
    /// True if nothing went wrong: somebody cancelled the operation.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Store(StoreError::Cancelled(_)))
    }

    pub(crate) fn host(op: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { op: op.into(), source }
    }

    pub(crate) fn kvm(op: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { op, source }
    }
}

/// This crate's result.
pub type Result<T, E = VmmError> = std::result::Result<T, E>;
