use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error_body::TokenRefusal;
use crate::service_account::{CLIENT_EMAIL, CLIENT_ID, ServiceAccount};

/// The audience that Google's own clients sign for, whatever the key file says.
const GOOGLE_AUDIENCE: &str = "https://oauth2.googleapis.com/token";
const LONGEST_LIFE_SECONDS: u64 = 3600;
const LEEWAY_SECONDS: u64 = 300;

/// What a service account asks for, after its signature and its dates were found good.
#[derive(Debug, Deserialize)]
pub(crate) struct Claims {
    iss: String,
    aud: String,
    iat: u64,
    exp: u64,
    /// Scopes with a space between them.
    #[serde(default)]
    pub(crate) scope: String,
    /// The user to act as.
    pub(crate) sub: Option<String>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
}

/// Checks a signed JWT in the order in which Google complains.
pub(crate) fn verify(
    assertion: &str,
    account: &ServiceAccount,
    token_uri: &str,
    now: u64,
) -> Result<Claims, TokenRefusal> {
    let malformed =
        || TokenRefusal::invalid_grant("Invalid JWT: it is not three base64url parts with JSON inside.");
    let (message, signature) = assertion.rsplit_once('.').ok_or_else(malformed)?;
    let (header, claims) = message.split_once('.').ok_or_else(malformed)?;
    let header: Header = decode(header).ok_or_else(malformed)?;
    let signature = URL_SAFE_NO_PAD.decode(unpadded(signature)).map_err(|_| malformed())?;

    if header.alg != "RS256" || !account.has_signed(header.kid.as_deref(), message.as_bytes(), &signature) {
        return Err(TokenRefusal::invalid_grant("Invalid JWT Signature."));
    }
    let claims: Claims = decode(claims).ok_or_else(malformed)?;
    if claims.iss != CLIENT_EMAIL && claims.iss != CLIENT_ID {
        return Err(TokenRefusal::invalid_grant("Invalid grant: account not found"));
    }
    if claims.aud != GOOGLE_AUDIENCE && claims.aud != token_uri {
        return Err(TokenRefusal::invalid_grant(
            "Invalid JWT: Failed audience check. The right audience is https://oauth2.googleapis.com/token",
        ));
    }
    let too_long = claims.exp > claims.iat.saturating_add(LONGEST_LIFE_SECONDS + LEEWAY_SECONDS);
    let not_yet = claims.iat > now.saturating_add(LEEWAY_SECONDS);
    if claims.exp <= now || claims.exp <= claims.iat || too_long || not_yet {
        return Err(TokenRefusal::invalid_grant(
            "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. \
             Check your iat and exp values in the JWT claim.",
        ));
    }
    Ok(claims)
}

fn decode<T: DeserializeOwned>(part: &str) -> Option<T> {
    let bytes = URL_SAFE_NO_PAD.decode(unpadded(part)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Google takes the parts of an assertion with and without padding; the clients differ.
fn unpadded(part: &str) -> &str {
    part.trim_end_matches('=')
}
