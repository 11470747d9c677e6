//! A changed project under an upper that stays.
