//! Signatures of Standard Webhooks, version 1: HMAC-SHA256 over `id.timestamp.body`.

use std::ops::RangeInclusive;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::error::{Error, ErrorKind};

/// What a secret begins with.
const PREFIX: &str = "whsec_";
/// Bytes of a secret.
const SECRET_BYTES: RangeInclusive<usize> = 24..=64;
/// Most secrets at a time: each makes the header of signatures longer.
const SECRETS_MAX: usize = 8;

/// A secret, ready to sign.
pub(super) type Signer = Hmac<Sha256>;

/// The secrets of a text. The errors name their place in it, and not what they are.
pub(super) fn signers(text: &str) -> Result<Vec<Signer>, Error> {
    let refused = |why: String| {
        Error::new(ErrorKind::Invalid, why)
            .with_hint("A secret is whsec_ and the base64 form of 24 to 64 random bytes: echo \"whsec_$(openssl rand -base64 32)\"")
    };
    let mut signers = Vec::new();
    for (nth, secret) in (1..).zip(text.split_whitespace()) {
        if nth > SECRETS_MAX {
            return Err(refused(format!("more than {SECRETS_MAX} secrets of a webhook")));
        }
        let Some(encoded) = secret.strip_prefix(PREFIX) else {
            return Err(refused(format!("secret {nth} of a webhook does not begin with {PREFIX}")));
        };
        let Ok(bytes) = BASE64_STANDARD.decode(encoded) else {
            return Err(refused(format!("secret {nth} of a webhook is not base64 behind {PREFIX}")));
        };
        if !SECRET_BYTES.contains(&bytes.len()) {
            let (least, most) = SECRET_BYTES.into_inner();
            return Err(refused(format!(
                "secret {nth} of a webhook has {} bytes: {least} to {most} are possible",
                bytes.len()
            )));
        }
        signers.push(Signer::new_from_slice(&bytes).expect("a key of HMAC may have any length"));
    }
    if signers.is_empty() {
        return Err(refused("no secret of a webhook".to_owned()));
    }
    Ok(signers)
}

/// What the header says: a signature for each secret.
pub(super) fn signatures(signers: &[Signer], id: &str, timestamp: u64, body: &str) -> String {
    let sign = |signer: &Signer| {
        let signed = signer.clone().chain_update(format!("{id}.{timestamp}.")).chain_update(body).finalize();
        format!("v1,{}", BASE64_STANDARD.encode(signed.into_bytes()))
    };
    signers.iter().map(sign).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_secret_is_refused_and_not_quoted() {
        let too_short = format!("whsec_{}", BASE64_STANDARD.encode([7; 23]));
        let too_long = format!("whsec_{}", BASE64_STANDARD.encode([7; 65]));
        let good = format!("whsec_{}", BASE64_STANDARD.encode([7; 24]));
        for (text, reason) in [
            ("", "no secret"),
            (" \n", "no secret"),
            ("C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "secret 1 of a webhook does not begin with whsec_"),
            ("whsec_C2FVsBQI_", "secret 1 of a webhook is not base64"),
            (&too_short, "23 bytes: 24 to 64"),
            (&too_long, "65 bytes: 24 to 64"),
            (&format!("{good}\nC2FVsBQI"), "secret 2"),
            (&[good.as_str(); 9].join(" "), "more than 8 secrets"),
        ] {
            let error = signers(text).expect_err("refused");
            assert!(error.to_string().contains(reason), "{error}");
            assert!(!format!("{error} {error:?}").contains("C2FVs") && error.hint().is_some(), "{error:?}");
        }
        assert_eq!(signers(&[good.as_str(); 8].join("\n")).expect("eight secrets").len(), 8);
    }

    #[test]
    fn signatures_are_those_of_another_implementation() {
        let secrets = ["whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"];
        let body = r#"{"a": "é.1"}"#;
        let theirs = secrets.map(|secret| {
            let webhook = standardwebhooks::Webhook::new(secret).expect("a secret");
            webhook.sign("msg_1", 1_614_265_330, body.as_bytes()).expect("signed")
        });
        let ours = signatures(&signers(&secrets.join("\n")).expect("secrets"), "msg_1", 1_614_265_330, body);
        assert_eq!(ours, theirs.join(" "));
    }
}
