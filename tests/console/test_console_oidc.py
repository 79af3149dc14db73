"""Sign-in through an identity provider, against a small one on loopback."""

import base64
import hashlib
import time
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

pytest.importorskip("authlib", reason="authlib is not installed")
from fixtures.review_service import ReviewService
from joserfc import jwt
from joserfc.jwk import RSAKey

from reft_ray.api.settings import OidcSettings
from reft_ray.console.oidc import OpenIdProvider

KEY = RSAKey.generate_key(2048, {"kid": "k", "alg": "RS256", "use": "sig"})


class Issuer:
    """An identity provider: every browser is `ada@example.org`; `claims` and `key` can be changed."""

    def __init__(self):
        self.app = FastAPI()
        self.key = self.signing = KEY
        self.claims = {"roles": ["staff", "reviewers"]}
        self.url, self.asked = "", {}

        @self.app.get("/.well-known/openid-configuration")
        def discovery():
            names = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "keys"}
            return {"issuer": self.url, **{name: f"{self.url}/{path}" for name, path in names.items()}}

        @self.app.get("/keys")
        def keys():
            return {"keys": [self.key.as_dict(private=False)]}

        @self.app.post("/token")
        async def token(request: Request):
            form = parse_qs((await request.body()).decode())
            challenge = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"][0].encode()).digest())
            assert challenge.rstrip(b"=").decode() == self.asked["code_challenge"]
            content = {
                "iss": self.url,
                "aud": "console",
                "sub": "1",
                "email": "ada@example.org",
                "exp": int(time.time()) + 60,
                "nonce": self.asked["nonce"],
                **self.claims,
            }
            signed = jwt.encode({"alg": "RS256", "kid": "k"}, content, self.signing)
            return {"access_token": "x", "token_type": "Bearer", "id_token": signed}

    def authorize(self, address):
        """What the browser comes back with."""
        self.asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        return f"{urlsplit(self.asked['redirect_uri']).path}?code=c&state={self.asked['state']}"


@pytest.fixture
def issuer(serving):
    found = Issuer()
    with serving(found.app) as url:
        found.url = url
        yield found


@pytest.fixture
def service(tmp_path, issuer):
    settings = OidcSettings(issuer=issuer.url, client_id="console", name="Example", roles={"reviewers": "curator"})
    found = ReviewService(tmp_path, provider=OpenIdProvider(settings))
    found.key("operator")  # a service with keys asks everyone to sign in
    yield found
    found.close()


@pytest.fixture
def client(service):
    with TestClient(service.app, follow_redirects=False, base_url="http://127.0.0.1") as client:
        yield client


def test_a_person_signs_in_with_their_role(client, issuer, service):
    assert "Sign in with Example" in client.get("/console/sign-in").text
    back = issuer.authorize(client.get("/console/oidc").headers["location"])
    assert client.get(back).headers["location"] == "/console"
    page = client.get("/console")
    assert "ada@example.org · curator" in page.text
    entry = service.stores.audit.entries(limit=1000)[-1]
    assert (entry.type, entry.actor["session"]["user"]) == ("session.created", "ada@example.org")


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"roles": "strangers"}, 403),
        ({"roles": []}, 403),
        ({"aud": "another"}, 400),
        ({"iss": "https://evil.example"}, 400),
        ({"nonce": "replayed"}, 400),
        ({"exp": 1}, 400),
    ],
)
def test_other_tokens_open_no_session(client, issuer, claims, status):
    back = issuer.authorize(client.get("/console/oidc").headers["location"])
    issuer.claims |= claims
    assert client.get(back).status_code == status
    assert client.get("/console").status_code == 303


def test_a_token_of_another_key_or_a_foreign_answer_opens_none(client, issuer):
    back = issuer.authorize(client.get("/console/oidc").headers["location"])
    assert client.get(back.replace("state=", "state=x")).status_code == 400
    issuer.signing = RSAKey.generate_key(2048, {"kid": "k"})
    assert client.get(back).status_code == 400
    client.cookies.clear()
    assert client.get(back).status_code == 400
    assert httpx.get(f"{issuer.url}/keys").status_code == 200
