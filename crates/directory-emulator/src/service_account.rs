use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{KeyPair, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, RsaKeyPair, UnparsedPublicKey};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use serde_json::json;

use crate::Error;

/// A key that everyone may read: it signs for nobody but this emulator.
const TEST_KEY: &str = include_str!("../data/worthless-test-key.pem");
const TEST_KEY_ID: &str = "0000worthless0test0key0000directory0emul";

pub(crate) const CLIENT_EMAIL: &str = "dir-sync@directory-emulator.iam.gserviceaccount.com";
pub(crate) const CLIENT_ID: &str = "100000000000000000001";

/// The one service account that the token endpoint knows.
#[derive(Debug)]
pub(crate) struct ServiceAccount {
    pair: RsaKeyPair,
}

impl ServiceAccount {
    pub(crate) fn new() -> Result<Self, Error> {
        let unusable = |what: String| Error::TestKey { what };
        let der = PrivatePkcs8KeyDer::from_pem_slice(TEST_KEY.as_bytes())
            .map_err(|error| unusable(error.to_string()))?;
        let pair =
            RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()).map_err(|error| unusable(error.to_string()))?;
        Ok(Self { pair })
    }

    /// Whether the key with this id (where one is named) made this RS256 signature.
    pub(crate) fn has_signed(&self, key_id: Option<&str>, message: &[u8], signature: &[u8]) -> bool {
        let key = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, self.pair.public_key());
        key_id.is_none_or(|id| id == TEST_KEY_ID) && key.verify(message, signature).is_ok()
    }

    /// These claims as a signed JWT, and the id of the key that signed them.
    pub(crate) fn sign(&self, claims: &str) -> Option<(&'static str, String)> {
        let header = json!({"alg": "RS256", "typ": "JWT", "kid": TEST_KEY_ID}).to_string();
        let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let mut signature = vec![0; self.pair.public().modulus_len()];
        self.pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message.as_bytes(), &mut signature).ok()?;
        Some((TEST_KEY_ID, format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))))
    }

    /// The text of the JSON key file, with the given address in place of Google's token endpoint.
    pub(crate) fn key_file(token_uri: &str) -> String {
        // Some clients refuse text in front of the key.
        let private_key =
            TEST_KEY.find("-----BEGIN").and_then(|start| TEST_KEY.get(start..)).unwrap_or(TEST_KEY);
        let key = json!({
            "type": "service_account",
            "project_id": "directory-emulator",
            "private_key_id": TEST_KEY_ID,
            "private_key": private_key,
            "client_email": CLIENT_EMAIL,
            "client_id": CLIENT_ID,
            "auth_uri": "https://accounts.google.com/o/oauth2/auth",
            "token_uri": token_uri,
            "universe_domain": "googleapis.com",
        });
        format!("{key:#}\n")
    }
}
