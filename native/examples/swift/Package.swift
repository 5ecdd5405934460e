// swift-tools-version:5.7
// The C library for Swift: `import CHalfbyte`. It is found through pkg-config, or linked into the app as an archive
// (cmake -DHALFBYTE_STATIC=ON, one slice an architecture, joined with xcodebuild -create-xcframework).
import PackageDescription

let package = Package(
    name: "Halfbyte",
    products: [.library(name: "CHalfbyte", targets: ["CHalfbyte"])],
    targets: [.systemLibrary(name: "CHalfbyte", pkgConfig: "halfbyte")]
)
