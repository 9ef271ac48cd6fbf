//! Feature words: those of the protocol, and the virtio bits that the transport itself understands.

use std::fmt;

macro_rules! feature_word {
    ($(#[$meta:meta])* $name:ident { $($(#[$bit_meta:meta])* $bit:literal => $constant:ident;)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub u64);

        impl $name {
            $($(#[$bit_meta])* pub const $constant: Self = Self(1 << $bit);)+

            /// Every bit that has a name, in ascending order.
            pub const NAMES: &'static [(u32, &'static str)] = &[$(($bit, stringify!($constant)),)+];

            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            #[must_use]
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                if self.0 == 0 {
                    return f.write_str("none");
                }
                let mut separator = "";
                for bit in (0..u64::BITS).filter(|bit| self.0 & (1 << bit) != 0) {
                    match Self::NAMES.iter().find(|(known, _)| *known == bit) {
                        Some((_, name)) => write!(f, "{separator}{name}")?,
                        None => write!(f, "{separator}bit {bit}")?,
                    }
                    separator = " | ";
                }
                Ok(())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x} ({self})", self.0)
            }
        }
    };
}

feature_word! {
    /// What GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES exchange.
    ProtocolFeatures {
        0 => MQ;
        1 => LOG_SHMFD;
        2 => RARP;
        3 => REPLY_ACK;
        4 => NET_MTU;
        5 => BACKEND_REQ;
        6 => CROSS_ENDIAN;
        7 => CRYPTO_SESSION;
        8 => PAGEFAULT;
        9 => CONFIG;
        10 => BACKEND_SEND_FD;
        11 => HOST_NOTIFIER;
        12 => INFLIGHT_SHMFD;
        13 => RESET_DEVICE;
        14 => INBAND_NOTIFICATIONS;
        15 => CONFIGURE_MEM_SLOTS;
        16 => STATUS;
        17 => XEN_MMAP;
        18 => SHARED_OBJECT;
        19 => DEVICE_STATE;
        20 => GET_VRING_BASE_INFLIGHT;
        21 => GPA_ADDRESSES;
        22 => SHMEM;
        23 => GET_VRING_BASE_SKIP_DRAIN;
    }
}

impl ProtocolFeatures {
    /// Features that make no sense without others, and those. vhost-user specification, "Protocol features".
    const REQUIREMENTS: &'static [(Self, Self)] = &[
        (Self::INBAND_NOTIFICATIONS, Self(Self::BACKEND_REQ.0 | Self::REPLY_ACK.0)),
        (Self::GET_VRING_BASE_INFLIGHT, Self::INFLIGHT_SHMFD),
        (Self::GET_VRING_BASE_SKIP_DRAIN, Self(Self::GET_VRING_BASE_INFLIGHT.0 | Self::INFLIGHT_SHMFD.0)),
    ];

    /// Refuse a choice of features of which one needs another that was not chosen.
    pub fn check_requirements(self) -> Result<(), String> {
        for (feature, required) in Self::REQUIREMENTS {
            let missing = required.without(self);
            if self.contains(*feature) && !missing.is_empty() {
                return Err(format!("{feature} needs {missing} beside it"));
            }
        }
        Ok(())
    }
}

feature_word! {
    /// The bits of GET_FEATURES and SET_FEATURES that belong to the transport and the rings, not to a device type.
    VirtioFeatures {
        24 => NOTIFY_ON_EMPTY;
        26 => LOG_ALL;
        27 => ANY_LAYOUT;
        28 => INDIRECT_DESC;
        29 => EVENT_IDX;
        30 => PROTOCOL_FEATURES;
        32 => VERSION_1;
        33 => ACCESS_PLATFORM;
        34 => RING_PACKED;
        35 => IN_ORDER;
        36 => ORDER_PLATFORM;
        37 => SR_IOV;
        38 => NOTIFICATION_DATA;
        39 => NOTIF_CONFIG_DATA;
        40 => RING_RESET;
        41 => ADMIN_VQ;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_shown_by_the_names_of_its_bits() {
        let word = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::CONFIG | ProtocolFeatures(1 << 40);
        assert_eq!(word.to_string(), "REPLY_ACK | CONFIG | bit 40");
        assert_eq!(VirtioFeatures(0).to_string(), "none");
    }

    #[test]
    fn a_feature_that_needs_another_is_refused_alone() {
        let inband = ProtocolFeatures::INBAND_NOTIFICATIONS;
        let refusal = (inband | ProtocolFeatures::REPLY_ACK).check_requirements();
        assert_eq!(refusal, Err("INBAND_NOTIFICATIONS needs BACKEND_REQ beside it".to_owned()));
        assert!((inband | ProtocolFeatures::REPLY_ACK | ProtocolFeatures::BACKEND_REQ).check_requirements().is_ok());
    }
}
