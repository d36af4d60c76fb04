"""Tables of ``trellis``: int8 values in units of 1/32, by width; see ``trellis_design``."""

from __future__ import annotations

import numpy as np

_HEX = {
    1: (  # mean square error 0.30464
        "12dff4033804ece9fc320ee028fefae4091419e6fe0611ebf8fcf225cff904ea"
        "e4f80811f7301700f5d8ed080a470615c4f9e2070e04dd0509212adbec28c6fd"
        "0e20f2e7200d39eff9fefd06f8e11d16fcd3e3f6391ebbcff9dcea18d21e010d"
        "f4142803e8e2e613e40b0f45fdfff6f1f6110fdee21115fec423cf0024e419e9"
        "c5041ee007e30e2917eff617f114390feeec200c11f4e20f000c0eeffb06d035"
        "24e7f6c9d12707fd1f031cdff80525d92ddcfa2aeff511f4f20e00c20ef7e516"
        "f6020ffb1df5ea152635defe19d0e1e8040c0e10e9e9ee122e0d13f2f6fe14d3"
        "f4390be4f1ed1b030ae0eb1f041804d308df2f1af31ffb27f3f8f30922f7f018"
    ),
    2: (  # mean square error 0.07812
        "c3ee1e06e0fa340d4513e1fb2105afef0721f2d4114bfbe2fae0112df0c8071f"
        "0720efd01135fee4f9e21142f0bc051fd4f21c07e1fc3a112c10e1fb2207d2f1"
        "2005cbf02b0dddf9e4fb3211d3f01d06efa10620f9e00f3d1029fbe3061ceebd"
        "f1d90620fbe2125f0f3afae10721f1cf2407cbf04b12dff9e1fb2d11bdf01f05"
        "efc8051dfae4102f1340fae2051dedce1e06d6f33512e1fbe4fa350fd5f12205"
        "1c07b4ee2f10e2fbdef92b11ceef1d03f2d2051dfbe30f2e103ff9e7071eefcc"
        "051deece0f28fae3fce21033f0d3051dc4ef1f06e3fb270f4d10e3fa1d04c7f0"
        "d6f21d05e2fa31122b0fe2fa1f05d0f2041eeeb8102efae2fbe20f36efd7051e"
    ),
    3: (  # mean square error 0.02005
        "c30f03dc1bf7ec2e03dbbb0eeb2e1cf714d3e408fd243cf2e40814cf3ff1fd24"
        "03dbc40fea311cf7c40e03dc1df8ec34e40815d24cf1fd2514d4e508fe2353f2"
        "eb2e1bf803dcc50e1cf7eb33a70f02db49f1fd25e30814cffc243bf115d1e409"
        "1cf8eb30b30e03dcec2d1cf803ddb70efd2340f215d0e30858f2fd25e40814d1"
        "0fb7db03f81c2debdc030fc531ecf71dd11508e426fdf26808e4d115f23b24fd"
        "db030e972fecf81c0ec1db03f81c2eeb08e4ce14f13d24fdcb1508e324fdf146"
        "32ebf71cdc020ec5f81c31ec0ec5dc03f14025fd08e4d21524fef24ad21409e4"
        "f81d2feb0ebddc032bebf71cdb030ead24fdf23bcd1508e4f13a24fd09e4d115"
    ),
    4: (  # mean square error 0.00538
        "c62402f137ddfc0c07ead419f7122de5dd390dfc21c0f20213f7e52bec071ac8"
        "ec0719ce12f7e529208df201d93c0cfcf71129e206ebcf1736dafc0cb91f01f1"
        "2be0f615d21c07e8fc0e4dd802efc32519c9ea07e43314f6f00222bb0efcdc3f"
        "0dfcda3bf10124bfe23014f61cd0ea0702efac25fc0e4bd7cd1a07e835e1f614"
        "21bdf002dd430efcea081ac814f6e43144d6fc0ea62601eff61430e008e8cc1d"
        "07e8d11bf6142be1b42102ef47dafc0e13f6e230ea071ccad73f0dfc269df001"
        "e52e13f719d4ec070dfcde6df20223b0d41907eb2ae5f71102f0c421fc0c54dc"
        "fc0c36d701f1c31f29e2f711cd1807ebf20121b60cfcdb5d19d1ec06e42f13f7"
    ),
}

TABLES = {bits: np.frombuffer(bytes.fromhex(text), np.int8) for bits, text in _HEX.items()}
