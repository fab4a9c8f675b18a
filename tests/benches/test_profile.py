"""The profile: which part of the work a stack belongs to, and the flame graph as a picture that any viewer takes."""

from xml.etree import ElementTree

import pytest
from world.bench import profile

MAIN = "_start;__libc_start_main_impl;main;std::sys::backtrace::__rust_begin_short_backtrace;ours::main;ours::main::{{closure}}"
LOAD = f"{MAIN};login_etl::handler::Handler::load::{{{{closure}}}}"
ENTRIES = f"{LOAD};login_etl::store::Session::write::{{{{closure}}}};login_etl::store::Entries::next"
ROW = f"{ENTRIES};login_etl::handler::Handler::load::{{{{closure}}}}::{{{{closure}}}};login_etl::login::Row::of"
PUSH = f"{ROW};login_etl::login::Login::mask;login_etl::login::push_masked"
WRITE = f"{LOAD};login_etl::store::Session::write::{{{{closure}}}}::{{{{closure}}}};login_etl::store::batch"
DRIVER = "ours::main;<tokio_postgres::connection::Connection<S,T> as core::future::future::Future>::poll"
SOCKET = "<tokio::net::tcp::stream::TcpStream as tokio::io::async_write::AsyncWrite>::poll_write"


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        (MAIN, "read the event"),
        (f"{MAIN};login_etl::scan::Reader::skip;login_etl::scan::Reader::raw_string", "read the event"),
        (f"{LOAD};login_etl::event::Message::sent", "read the event"),
        (ROW, "bodies into rows"),
        (f"{ROW};login_etl::scan::Reader<_>::string", "bodies into rows"),
        (f"{ROW};login_etl::login::required;login_etl::login::optional", "bodies into rows"),
        (f"{ROW};__memcpy_avx512_unaligned_erms", "bodies into rows"),
        (f"{ROW};__GI___libc_malloc;_int_malloc", "allocate"),
        (f"{PUSH};<login_etl::mask::Cbc<C> as login_etl::mask::Cipher>::encrypt", "mask"),
        (f"{PUSH};<base64::engine::general_purpose::GeneralPurpose as base64::engine::Engine>::internal_encode", "mask"),
        (LOAD, "keys"),
        (f"{LOAD};core::hash::BuildHasher::hash_one", "keys"),
        (f"{LOAD};core::slice::sort::stable::quicksort::quicksort", "sort"),
        (f"{WRITE}::Arrays::of", "encode"),
        (f"{WRITE}::copy_rows::{{{{closure}}}};__memcpy_avx512_unaligned_erms", "encode"),
        (DRIVER, "send and receive"),
        (f"{DRIVER};{SOCKET};__libc_send", "send and receive"),
        (f"{MAIN};std::fs::read::inner;__GI___libc_read", "other"),
    ],
)
def test_a_stack_belongs_to_the_part_that_its_function_nearest_to_the_leaf_tells(stack, part):
    assert profile.parts({stack: 1}) == {part: 1}


def test_a_function_is_named_without_its_types_and_without_this_machine_s_paths():
    names = {
        "<login_etl::mask::Cbc<C> as login_etl::mask::Cipher>::encrypt": "login_etl::mask::Cbc::encrypt",
        "core::ptr::drop_in_place<[login_etl::login::Value; 6]>": "core::ptr::drop_in_place",
        "login_etl::handler::Handler::load::{{closure}}::h0123456789abcdef": "login_etl::handler::Handler::load",
        "ours::main::{closure@/home/me/src/main.rs:1:2}": "ours::main",
        "<core::iter::Map<I, {closure@/home/me/src/lib.rs:1:2}> as core::iter::Iterator>::next": "core::iter::Map::next",
    }
    assert {frame: profile.named(frame) for frame in names} == names


def test_a_flame_graph_is_well_formed_and_each_frame_is_as_wide_as_its_share():
    row = f"{LOAD};login_etl::login::Row::of"
    folded = f"{row};core::ptr::drop_in_place<[login_etl::login::Value; 6]> 1\n{row};<&T as a::B & C>::d < e 1\n{MAIN} 1\n{MAIN} 1\n"
    picture = ElementTree.fromstring(profile.flame_graph(profile.counted(folded)))
    titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[:4] == ["all 100.0%", "ours::main 100.0%", "login_etl::handler::Handler::load 50.0%", "login_etl::login::Row::of 50.0%"]
    assert sorted(titles[4:]) == ["&T::d < e 25.0%", "core::ptr::drop_in_place 25.0%"]
